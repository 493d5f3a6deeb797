"""Which scheduler a checkpoint comes with, for the pipelines whose own source does not say it; written by hand.

Nothing was downloaded for it: a checkpoint's own ``scheduler_config.json`` would settle each line. Where it is from:

- ``SCRIPT``: what diffusers' script that converts this model writes by default (``scripts/`` at its commit 58eb52c).
- ``TEXT``: a docstring or a page of diffusers' documentation names it.
- ``TESTS``: diffusers' own tests of the pipeline use it.
- ``MEMORY``: general knowledge of the checkpoint, not looked up. The surest are those that many people know (SDXL's,
  Stable Diffusion 1.5's); the least sure are relatives of Stable Diffusion 1 and 2, which are PNDM, DDIM or Euler
  ancestral. All three are served.
"""

from __future__ import annotations

SCRIPT = "a conversion script"
TEXT = "documentation"
TESTS = "diffusers' tests"
MEMORY = "general knowledge"

_PNDM, _DDIM, _DDPM = "PNDMScheduler", "DDIMScheduler", "DDPMScheduler"
_EULER, _FLOW = "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"
_DPM, _UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"

KNOWN: dict[str, tuple[str, str]] = {
    "AIML-TUDA/stable-diffusion-safe": (_PNDM, MEMORY),
    "BAAI/AltDiffusion-m9": (_PNDM, MEMORY),
    "BestWishYsh/Helios-Base": ("HeliosScheduler", TEXT),
    "CompVis/ldm-super-resolution-4x-openimages": (_DDIM, MEMORY),
    "CompVis/ldm-text2im-large-256": (_DDIM, MEMORY),
    "CompVis/stable-diffusion-v1-4": (_PNDM, SCRIPT),
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": (_DPM, SCRIPT),
    "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers": ("SCMScheduler", SCRIPT),
    "Fantasy-Studio/Paint-by-Example": (_PNDM, MEMORY),
    "Intel/ldm3d-4c": (_PNDM, MEMORY),
    "Kwai-Kolors/Kolors-diffusers": (_EULER, MEMORY),
    "Lightricks/LTX-2": (_FLOW, SCRIPT),
    "Motif-Technologies/Motif-Video-2B": (_FLOW, TESTS),
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": (_DPM, SCRIPT),
    "PixArt-alpha/PixArt-Sigma-XL-2-512-MS": (_DPM, SCRIPT),
    "THUDM/CogVideoX-2b": ("CogVideoXDDIMScheduler", SCRIPT),
    "THUDM/CogVideoX-5b-I2V": ("CogVideoXDPMScheduler", MEMORY),
    "THUDM/CogView3-Plus-3B": ("CogVideoXDDIMScheduler", SCRIPT),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": (_UNIPC, SCRIPT),
    "anhnct/Gligen_Inpainting_Text_Image": (_DDIM, SCRIPT),
    "briaai/BRIA-3.2": (_FLOW, TESTS),
    "briaai/FIBO": (_FLOW, TESTS),
    "briaai/Fibo-Edit-1.5-base": (_FLOW, TESTS),
    "cvssp/audioldm-s-full-v2": (_DDIM, SCRIPT),
    "cvssp/audioldm2": (_DDIM, SCRIPT),
    "damo-vilab/text-to-video-ms-1.7b": (_DDIM, MEMORY),
    "decart-ai/Lucy-Edit-Dev": (_UNIPC, MEMORY),  # a Wan model
    "diffusers/sdxl-instructpix2pix-768": (_EULER, MEMORY),
    "fusing/stable-unclip-2-1-l": (_PNDM, SCRIPT),
    "fusing/stable-unclip-2-1-l, prior": (_DDPM, TEXT),
    "harmonai/maestro-150k": ("IPNDMScheduler", SCRIPT),
    "kandinsky-community/kandinsky-2-1": (_DDIM, MEMORY),
    "kandinsky-community/kandinsky-2-1-inpaint": (_DDIM, MEMORY),
    "kandinskylab/Kandinsky-6.0-Pro-distill-5s-Diffusers": ("PiflowScheduler", TEXT),
    "lambdalabs/sd-image-variations-diffusers": (_PNDM, MEMORY),
    "masterful/gligen-1-4-inpainting-text-box": (_DDIM, SCRIPT),
    "maxin-cn/Latte-1": (_DDIM, TESTS),
    "nvidia/ChronoEdit-14B-Diffusers": (_UNIPC, MEMORY),  # a Wan model
    "prs-eth/marigold-depth-v1-1": (_DDIM, MEMORY),
    "prs-eth/marigold-iid-appearance-v1-1": (_DDIM, MEMORY),
    "prs-eth/marigold-normals-v1-1": (_DDIM, MEMORY),
    "rhymes-ai/Allegro": ("EulerAncestralDiscreteScheduler", MEMORY),
    "shi-labs/versatile-diffusion": (_PNDM, SCRIPT),
    "stabilityai/stable-audio-open-1.0": ("CosineDPMSolverMultistepScheduler", SCRIPT),
    "stabilityai/stable-diffusion-2-1-base": (_PNDM, SCRIPT),
    "stabilityai/stable-diffusion-2-1-unclip-small": (_PNDM, SCRIPT),
    "stabilityai/stable-diffusion-2-depth": (_PNDM, SCRIPT),
    "stabilityai/stable-diffusion-x4-upscaler": (_DDIM, MEMORY),
    "stabilityai/stable-diffusion-xl-base-1.0": (_EULER, MEMORY),
    "stabilityai/stable-diffusion-xl-refiner-1.0": (_EULER, MEMORY),
    "stable-diffusion-v1-5/stable-diffusion-inpainting": (_PNDM, SCRIPT),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (_PNDM, SCRIPT),
    "teticio/audio-diffusion-256": (_DDPM, MEMORY),
    "thu-ml/unidiffuser-v1": (_DPM, SCRIPT),
    "timbrooks/instruct-pix2pix": (_PNDM, MEMORY),
    "ucsd-reach/musicldm": (_DDIM, SCRIPT),
}
"""Checkpoints, with the class of their scheduler and where that is from."""

AGAINST_ANNOTATION: dict[str, str] = {
    "ChronoEditPipeline": "nvidia/ChronoEdit-14B-Diffusers",
    "LucyEditPipeline": "decart-ai/Lucy-Edit-Dev",
    "SanaPAGPipeline": "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
    "SanaSprintImg2ImgPipeline": "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
    "SanaSprintPipeline": "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
    "StableAudioPipeline": "stabilityai/stable-audio-open-1.0",
    "WanImageToVideoPipeline": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "WanPipeline": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "WanVACEPipeline": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "WanVideoToVideoPipeline": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
}
"""Pipelines whose annotation names one class, and whose checkpoints come with another."""

WITHOUT_EXAMPLE: dict[str, str] = {
    "LTX2VideoDiffusionDecodePipeline": "Lightricks/LTX-2",
    "OnnxStableDiffusionImg2ImgPipeline": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "OnnxStableDiffusionInpaintPipeline": "stable-diffusion-v1-5/stable-diffusion-inpainting",
    "OnnxStableDiffusionInpaintPipelineLegacy": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "OnnxStableDiffusionPipeline": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "OnnxStableDiffusionUpscalePipeline": "stabilityai/stable-diffusion-x4-upscaler",
    "StableDiffusionInpaintPipelineLegacy": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "StableDiffusionOnnxPipeline": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "TextToVideoZeroPipeline": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "TextToVideoZeroSDXLPipeline": "stabilityai/stable-diffusion-xl-base-1.0",
    "UniDiffuserPipeline": "thu-ml/unidiffuser-v1",
}
"""Pipelines whose docstrings load no checkpoint, with the one that they are made for."""
