"""What is written beside each example workflow, in the editor's markdown."""

from __future__ import annotations

_PICTURES = """
The *Load Image* nodes name pictures that you may not have: choose your own. The encoder sees a \
square, so *crop* decides what becomes of the rest: `center` cuts it off, `pad` adds bars, `none` \
squeezes the picture.
"""
_SETTINGS = """
Sampling is the paper's: DDIM (`ddim` with `ddim_uniform`), 50 steps, guidance 7.5. The seed stays \
fixed, so that a changed weight is the only thing that changes.
"""
_IMAGE_ONLY = """
The text is empty and the weight 1, as the paper has it where the picture is the whole prompt. A \
lower weight gives more variety and less likeness.
"""
_BATCH = """
*Batch Images* scales and crops the second and third picture to the first one's shape.
"""


def _note(heading: str, *parts: str) -> str:
    return "\n".join([f"# {heading}\n", *(part.strip() + "\n" for part in parts)])


NOTES = {
    "text_and_image": _note(
        "Text and image",
        "The picture says what it should look like, the text what is different.",
        """
**Weight 0.6.** At weight 1 the picture decides nearly everything and the words are lost. Half to \
two thirds leaves them room; the authors' own code (tencent-ailab/IP-Adapter) uses 0.6 for this \
and recommends 0.5 to start from. Lower it if the text is ignored, raise it if the picture is.
""",
        _SETTINGS,
        _PICTURES,
    ),
    "image_only": _note(
        "Image only", "Variations of a picture: no text at all.", _IMAGE_ONLY, _SETTINGS, _PICTURES
    ),
    "several_images_concat": _note(
        "Several pictures, all at once",
        """
`concat` lays the tokens of all pictures side by side: every part of the new picture can look at \
each of them and take what fits.
""",
        _IMAGE_ONLY,
        _BATCH,
        _SETTINGS,
        _PICTURES,
    ),
    "several_images_average": _note(
        "Several pictures, their mean",
        """
`average` takes the mean of what the encoder says of the pictures: one prompt between all of them, \
at the cost of one.
""",
        _IMAGE_ONLY,
        _BATCH,
        _SETTINGS,
        _PICTURES,
    ),
    "several_images_per_latent": _note(
        "Several pictures, one for each result",
        """
`per_latent` gives the first latent of the batch the first picture, the second the second, and so \
on: three variations of three pictures in one go. *batch_size* must be a multiple of the number of \
pictures.
""",
        _IMAGE_ONLY,
        _BATCH,
        _SETTINGS,
        _PICTURES,
    ),
    "several_images_masks": _note(
        "Several pictures, each in its place",
        """
Two *Apply IP-Adapter* nodes in a row, each with its own picture and mask: the first acts where \
the mask is white, the second where it is black. Masks may have any size and may overlap.
""",
        """
The fine-grained adapter (`plus`) keeps more of each picture than the base one; either works here.
""",
        _IMAGE_ONLY,
        _SETTINGS,
        _PICTURES,
    ),
    "image_to_image": _note(
        "Image to image",
        """
Sampling starts from one picture and follows another: layout from the first, content and style \
from the reference.
""",
        """
*denoise* 0.6, as in the authors' own code (tencent-ailab/IP-Adapter), says how much of the first \
picture is painted over.
""",
        _IMAGE_ONLY,
        _SETTINGS,
        _PICTURES,
    ),
    "inpainting": _note(
        "Inpainting",
        """
The white part of the mask is painted anew after the reference picture; the rest keeps its pixels.
""",
        """
*denoise* 0.7, as in the authors' own code (tencent-ailab/IP-Adapter); 1 forgets what was there. \
Picture and mask go through the same crop, so give them the same shape.
""",
        _IMAGE_ONLY,
        _SETTINGS,
        _PICTURES,
    ),
    "controlnet": _note(
        "Structure control",
        """
The ControlNet keeps the edges of one picture, the adapter gives the content of another. Neither \
knows of the other: any ControlNet or T2I-Adapter of the checkpoint's family fits here.
""",
        _IMAGE_ONLY,
        _SETTINGS,
        _PICTURES,
    ),
    "another_checkpoint": _note(
        "Another checkpoint of the family",
        """
*Image only* with one change: the checkpoint is DreamShaper 8, fine-tuned from Stable Diffusion \
1.5. An adapter is trained once and works with every checkpoint of its family.
""",
        _IMAGE_ONLY,
        _SETTINGS,
        _PICTURES,
    ),
    "per_prompt": _note(
        "One picture for each prompt",
        """
*Apply IP-Adapter (Conditioning)* ties a picture to one prompt instead of to the whole model. Here \
the left half follows one text and picture, the right half another.
""",
        """
Chain the model through both nodes. The negative comes from the first one alone: an unconditional \
prediction needs one empty picture, not two.
""",
        "Weight 0.8 leaves some room for the texts: describe there what each half shows.",
        _SETTINGS,
        _PICTURES,
    ),
    "sdxl": _note(
        "SDXL",
        """
The same graph as *Text and image* with SDXL and an adapter for it that reads the same image \
encoder, ViT-H. `ip-adapter_sdxl` was trained with the larger ViT-bigG: with it, load that \
encoder.
""",
        """
**Weight 0.6** leaves the words some room, as with SD1.5. SDXL wants about a million pixels: \
1024 x 1024 or another shape of that area.
""",
        _SETTINGS,
        _PICTURES,
    ),
    "style_transfer": _note(
        "Style transfer",
        """
The picture gives colours and style, the text says what is to be seen. *Layer Weights* lets the \
image act only on the cross-attention layers that carry style; its picture shows which.
""",
        """
Other presets: `composition` for what is where, `style without composition` to turn away from it, \
`strong style` for all but the composition. In *changes*, single blocks can be set: \
`input 8: 0.5`.
""",
        _SETTINGS,
        _PICTURES,
    ),
    "weight_curve": _note(
        "Weight over the schedule",
        """
The curve multiplies the weight, from the schedule's start on the left to its end on the right. \
Early steps decide what is where, late ones the detail: here the picture leads at first and the \
text has the last word.
""",
        """
Drag the curve's points. Whatever it looks like, no step costs more: there is no further call of \
the UNet.
""",
        _SETTINGS,
        _PICTURES,
    ),
    "weights_per_latent": _note(
        "A weight for each latent",
        """
Four latents, four weights in one run: `0: 0, 3: 1` are keyframes, linear between latent 0 and 3. \
For an animation, give a frame's number and weight; with *per_latent* and a batch of pictures \
every frame has a picture of its own too. *Context Windows (Manual)* over a batch of frames works \
with both.
""",
        _SETTINGS,
        _PICTURES,
    ),
    "regions": _note(
        "Several pictures, each in its region, in one node",
        """
The first picture acts where the mask is white. There is one picture more than masks, so the last \
one gets what they leave free. Further prompts and masks appear as you connect them; where masks \
overlap, the regions share.
""",
        """
The fine-grained adapter (`plus`) keeps more of each picture than the base one; either works here.
""",
        _IMAGE_ONLY,
        _SETTINGS,
        _PICTURES,
    ),
    "attention_map": _note(
        "Where the picture acts",
        """
*Record Image Attention* watches the sampling, *Image Attention Map* lays over the result what it \
saw: the share of the image prompt in the output of the cross-attention layers. With the mask, \
only the masked part is warm.
""",
        """
Look at single blocks (`output 5`) or at a part of the steps. The picture itself stays the same to \
the bit; without the two nodes nothing is recorded and nothing costs anything.
""",
        _SETTINGS,
        _PICTURES,
    ),
    "weight_start_grid": _note(
        "Weights and starts side by side",
        """
*Weights × Starts* gives every pair, and ComfyUI runs *Apply* and the sampler once for each: nine \
pictures. A late start leaves the layout to the text and takes colour and detail from the picture.
""",
        _SETTINGS,
        _PICTURES,
    ),
    "auto_load": _note(
        "Text and image, the files found automatically",
        """
*Load IP-Adapter (Auto)* looks at the model and into the files in `models/ipadapter` and \
`models/clip_vision`, and takes the adapter of the chosen kind with its image encoder. Only \
`light` and `standard`, and `face` and `fine-grained`, look alike inside: the words *light* and \
*face* in the name tell them apart. Change the checkpoint to SDXL, and it takes others.
""",
        """
Its output *chosen* says what it took, why, and what is in doubt; where something is missing, the \
error says what, where it looked and where to download it.
""",
        _SETTINGS,
        _PICTURES,
    ),
    "combined_prompts": _note(
        "A prompt calculated from two pictures",
        """
*Combine Image Prompts* weighs the pictures before the adapter sees them: here seven parts of the \
first and three of the second. It can also lay them side by side, add, or take one away from the \
other.
""",
        _IMAGE_ONLY,
        _SETTINGS,
        _PICTURES,
    ),
    "whole_picture": _note(
        "All of a wide or large picture",
        """
The encoder sees a small square. *Prepare Image for Prompt* shows which, and here cuts the picture \
into tiles, so that nothing is lost: each becomes an image of its own in the prompt. `point` \
takes the square around a place that you choose.
""",
        _IMAGE_ONLY,
        _SETTINGS,
        _PICTURES,
    ),
    "negative_noise": _note(
        "A noisy negative image",
        """
Guidance steers away from an empty image. Here it is a noisy version of the reference instead: \
what both have in common counts less, what the noise destroyed, detail and clarity, counts more.
""",
        """
**Weight 0.6** leaves the words some room.
""",
        _SETTINGS,
        _PICTURES,
    ),
    "save_prompt": _note(
        "Save an image prompt",
        """
*Save Image Prompt* writes what the encoder saw into the output folder: about 2.6 MB with ViT-H, \
1.3 MB more for each further image. *Load Image Prompt* takes it from there: without the picture, \
without the encoder, and to the bit the same. The workflow *load_prompt* does.
""",
        _IMAGE_ONLY,
        _SETTINGS,
        _PICTURES,
    ),
    "load_prompt": _note(
        "Load a saved image prompt",
        """
**Run the workflow *save_prompt* first**, then press R: *Load Image Prompt* names the file that \
its first run writes. No picture and no image encoder is loaded here.
""",
        """
The adapter must be one for the image encoder that the prompt was made with, here ViT-H.
""",
        _IMAGE_ONLY,
        _SETTINGS,
    ),
    "face": _note(
        "A face",
        """
The adapter `plus-face` is `plus`, trained with cropped faces as references. Let the text say what \
is around the face.
""",
        """
Let the face fill the square that the encoder sees: *Prepare Image for Prompt* shows it, and with \
`point` takes the square around `x` and `y`. The square is as large as the short side: of a whole \
figure, cut out the head first.
""",
        """
**Weight 0.6** leaves the words some room; raise it for more likeness. `ip-adapter-full-face_sd15` \
stands for a closer face. For SDXL take `ip-adapter-plus-face_sdxl_vit-h`.
""",
        _SETTINGS,
        _PICTURES,
    ),
}
