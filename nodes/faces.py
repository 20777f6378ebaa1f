"""Load a face encoder, and encode faces."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..ip_adapter_core.comfyui.encode_faces import ORDERS, SEVERAL, encode_faces, prompt_of
from ..ip_adapter_core.comfyui.host import schema
from ..ip_adapter_core.face_encoder import FaceEncoder
from . import paths, types

_LICENCE = "The weights of insightface's model packs are for non-commercial research only."


class LoadFaceEncoder(types.Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IPA_LoadFaceEncoder",
            display_name="Load Face Encoder",
            category="model/loaders",
            search_aliases=["insightface", "faceid", "face analysis", "arcface", "ip adapter face"],
            description=(
                "Reads what finds and describes faces for FaceID: insightface's model packs in "
                f"models/insightface/models, by onnxruntime alone. {_LICENCE}"
            ),
            inputs=[
                io.Combo.Input(
                    "encoder_name",
                    options=[*paths.face_encoders()],
                    tooltip="A folder in models/insightface/models: buffalo_l for FaceID and "
                    "Portrait, antelopev2 for other adapters.",
                )
            ],
            outputs=[
                types.output(
                    types.FaceEncoder, "face_encoder", "The face encoder: for Encode Face."
                )
            ],
        )

    @classmethod
    def execute(cls, encoder_name: str) -> io.NodeOutput:
        return io.NodeOutput(FaceEncoder(paths.face_encoder_path(encoder_name)))


class EncodeFace(types.Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IPA_EncodeFace",
            display_name="Encode Face",
            category="model/conditioning",
            search_aliases=["ip adapter face", "faceid", "face embedding", "insightface"],
            description=(
                "Turns pictures of faces into an image prompt for FaceID adapters, and shows which "
                "face was taken, with its five points."
            ),
            inputs=[
                types.FaceEncoder.Input(
                    "face_encoder",
                    optional=True,
                    tooltip="From Load Face Encoder. Not needed with face_embeds.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="A picture with a face, or a batch: one face of each.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="CLIP ViT-H/14, which reads the face's crop: for FaceID Plus only.",
                ),
                io.Combo.Input(
                    "order",
                    options=list(ORDERS),
                    default=ORDERS[0],
                    tooltip="How the faces of a picture are counted: from the largest, or from the "
                    "left.",
                ),
                io.Int.Input(
                    "number", default=1, min=1, max=64, tooltip="Which of them, counted from 1."
                ),
                io.Combo.Input(
                    "several",
                    options=list(SEVERAL),
                    default=SEVERAL[0],
                    tooltip="Several pictures: side by side as several images of the prompt, or "
                    "averaged to one face, for pictures of one person.",
                ),
                io.Float.Input(
                    "structure",
                    default=1.0,
                    min=-1.0,
                    max=5.0,
                    step=0.05,
                    tooltip="FaceID Plus v2 only: how much of the crop itself is followed beside "
                    "the face's embedding.",
                ),
                io.Custom("EMBEDS").Input(
                    "face_embeds",
                    optional=True,
                    tooltip="Face embeddings from elsewhere, 512 numbers each, in place of the "
                    "picture's. The picture, if there is one, is then the crop for FaceID Plus.",
                ),
            ],
            outputs=[
                types.output(
                    types.ImagePrompt, "image_prompt", "The faces as a prompt: for the Apply nodes."
                ),
                types.output(io.Image, "crops", "The faces as FaceID Plus sees them."),
                types.output(
                    io.Image, "faces", "Which faces were taken: box and five points in the picture."
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        order: str,
        number: int,
        several: str,
        structure: float,
        face_encoder: FaceEncoder | None = None,
        image: Tensor | None = None,
        clip_vision: Any = None,
        face_embeds: Tensor | None = None,
    ) -> io.NodeOutput:
        if face_embeds is not None:
            named = "face embeddings from elsewhere"
            made = prompt_of(face_embeds, clip_vision, image, named, structure, several)
            return io.NodeOutput(made, image, image)
        if face_encoder is None or image is None:
            raise ValueError(
                "There is nothing to encode: connect a Load Face Encoder and a picture, or "
                "face_embeds from elsewhere."
            )
        given = {"order": order, "number": number, "several": several, "structure": structure}
        found = encode_faces(face_encoder, image, clip_vision, **given)
        shown = ui.PreviewImage(found.shown, cls=cls)
        return io.NodeOutput(found.prompt, found.crops, found.shown, ui=shown)
