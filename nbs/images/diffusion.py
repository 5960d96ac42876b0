"""Draws diffusion.png, the picture at the top of the diffusion lesson:

    python nbs/images/diffusion.py

One drawing by the shipped base, looked at eight times. The lesson draws and explains the same one.
"""

from importlib.resources import files
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from causal_story.diffusion import decode_latents

CAPTION = "Kiki jumps with a balloon, wearing a red scarf."
BASE = files("causal_story") / "weights" / "base"
GREY = "#4a4a4a"


@torch.no_grad()
def draw():
    "(what is in hand, what it is believed to become), nine latents each."
    unet = UNet2DConditionModel.from_pretrained(BASE / "unet").float()
    text_encoder = CLIPTextModel.from_pretrained(BASE / "text_encoder").float()
    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    solver = DDIMScheduler.from_pretrained(
        BASE / "scheduler", timestep_spacing="trailing", set_alpha_to_one=True
    )
    solver.set_timesteps(8)
    states = text_encoder(tokenizer(CAPTION, return_tensors="pt").input_ids).last_hidden_state
    z = torch.randn(1, 12, 8, 8, generator=torch.Generator().manual_seed(36))
    hand, guesses = [], []
    for t in solver.timesteps:
        step = solver.step(unet(z, t, states).sample, t, z)
        hand.append(z)
        guesses.append(step.pred_original_sample)
        z = step.prev_sample
    return torch.cat([*hand, z]), torch.cat([*guesses, z])


def main():
    vae = AutoencoderKL.from_pretrained(BASE / "vae").float()
    figure, axes = plt.subplots(2, 9, figsize=(9.6, 2.35), dpi=110)
    for row, latents in zip(axes, draw()):
        with torch.no_grad():
            frames = decode_latents(vae, latents)
        for ax, frame in zip(row, ((frames + 1) / 2).permute(0, 2, 3, 1)):
            ax.imshow(frame)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    for ax, label in zip(axes[:, 0], ("in hand", "its guess")):
        ax.set_ylabel(label, fontsize=9, color=GREY, rotation=0, ha="right", va="center")
    for ax, title in zip(axes[0], ("noise", *(f"step {k}" for k in range(1, 8)), "picture")):
        ax.set_title(title, fontsize=9, color=GREY)
    figure.subplots_adjust(wspace=0.04, hspace=0.04)
    path = Path(__file__).with_name("diffusion.png")
    figure.savefig(path, facecolor="white", bbox_inches="tight")
    plt.close(figure)
    picture = Image.open(path).convert("RGB")
    picture.quantize(255, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE).save(path)


if __name__ == "__main__":
    main()
