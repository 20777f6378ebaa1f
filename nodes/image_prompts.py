"""Combine, save and load image prompts."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import PurePath

from comfy.cli_args import args
from comfy_api.latest import io, ui

from ..ip_adapter_core import prompt_file
from ..ip_adapter_core.combine import METHODS, combine, parse_weights
from ..ip_adapter_core.comfyui.host import schema
from ..ip_adapter_core.image_prompt import ImagePrompt
from . import paths, types

MOST = 50


class CombineImagePrompts(types.Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        template = io.Autogrow.TemplatePrefix(
            types.ImagePrompt.Input("prompt", tooltip="All must be of one image encoder."),
            prefix="prompt",
            min=1,
            max=MOST,
        )
        return schema(
            node_id="IPA_CombinePrompts",
            display_name="Combine Image Prompts",
            category="model/conditioning",
            search_aliases=["merge image prompts", "ip adapter combine embeds", "average embeds"],
            description=(
                "Makes one image prompt of several: all images side by side, or one image that "
                "is calculated from theirs."
            ),
            inputs=[
                io.Autogrow.Input(
                    "prompts",
                    template=template,
                    tooltip="A prompt of one image goes with each image of the others.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="concat",
                    tooltip="concat: all images side by side. average: their weighted mean. "
                    "norm_average: the mean direction with the mean length, which keeps the "
                    "strength of a single image. add: the weighted sum. subtract: the first "
                    "without the others. max, min: number by number.",
                ),
                io.String.Input(
                    "weights",
                    default="",
                    tooltip='One number per prompt, as in "1, 0.5"; empty for 1 each. concat takes '
                    "1 only.",
                ),
            ],
            outputs=[
                types.output(
                    types.ImagePrompt,
                    "image_prompt",
                    "The combined prompt, of the same image encoder.",
                )
            ],
        )

    @classmethod
    def execute(cls, prompts: io.Autogrow.Type, method: str, weights: str) -> io.NodeOutput:
        given = types.in_order(prompts)
        return io.NodeOutput(combine(given, method, parse_weights(weights, len(given))))


class SaveImagePrompt(types.Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IPA_SavePrompt",
            display_name="Save Image Prompt",
            category="model/conditioning",
            search_aliases=["export image prompt", "ip adapter save embeds", "save embeds"],
            description=(
                "Writes an image prompt into the output folder, so that it can be used again "
                "without its pictures and without the image encoder."
            ),
            inputs=[
                types.ImagePrompt.Input("image_prompt", tooltip="Is passed on as it is."),
                io.String.Input(
                    "filename_prefix",
                    default="image_prompts/prompt",
                    tooltip="Folder and name below the output folder; a number is added. Load "
                    "Image Prompt lists what lies in image_prompts.",
                ),
            ],
            outputs=[types.output(types.ImagePrompt, "image_prompt", "The same prompt.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        """Refuse at once what would be refused after encoding; None comes over a link."""
        try:
            return filename_prefix is None or bool(paths.checked_prefix(filename_prefix))
        except ValueError as error:
            return str(error)

    @classmethod
    def execute(cls, image_prompt: ImagePrompt, filename_prefix: str) -> io.NodeOutput:
        for target in paths.targets(filename_prefix):
            with contextlib.suppress(FileExistsError):  # another server was faster
                prompt_file.save(image_prompt, target.path, cls._workflow())
                break
        place = PurePath("output", target.subfolder, target.filename)
        types.show(cls, place.as_posix())
        saved = ui.SavedResult(target.filename, target.subfolder, io.FolderType.output)
        return io.NodeOutput(image_prompt, ui={"image_prompts": [saved]})

    @classmethod
    def _workflow(cls) -> dict[str, str]:
        """Return what ComfyUI writes into every file that it saves, for the editor to open."""
        if args.disable_metadata or cls.hidden is None:
            return {}
        given = {"prompt": cls.hidden.prompt, **(cls.hidden.extra_pnginfo or {})}
        return {key: json.dumps(value) for key, value in given.items() if value is not None}


class LoadImagePrompt(types.Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IPA_LoadPrompt",
            display_name="Load Image Prompt",
            category="model/conditioning",
            search_aliases=["import image prompt", "ip adapter load embeds", "load embeds"],
            description="Reads an image prompt that Save Image Prompt wrote, to the bit.",
            inputs=[
                io.Combo.Input(
                    "prompt_name",
                    options=paths.prompt_names(),
                    tooltip="A file in the folder image_prompts of the output or input folder. "
                    "Press R to see new ones. The adapter must be one for the image encoder that "
                    "the prompt was made with.",
                )
            ],
            outputs=[
                types.output(
                    types.ImagePrompt,
                    "image_prompt",
                    "The saved prompt: for the Apply nodes, or Combine Image Prompts.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, prompt_name: object = None) -> bool | str:
        """Check the name in place of ComfyUI's look at the list.

        Other files of the same folders may be named too. None comes over a link, and is looked at
        when it is known.
        """
        try:
            return prompt_name is None or bool(paths.prompt_path(prompt_name))
        except (ValueError, OSError) as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, prompt_name: str | None = None) -> str:
        """Return a hash, so that a changed file is read anew.

        Its time is not enough: files are small, and may be written twice within one tick of the
        clock. None comes over a link: what that gives counts by itself.
        """
        if prompt_name is None:
            return ""
        digest = hashlib.sha256()
        with open(paths.prompt_path(prompt_name), "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()

    @classmethod
    def execute(cls, prompt_name: str) -> io.NodeOutput:
        return io.NodeOutput(prompt_file.load(paths.prompt_path(prompt_name)))
