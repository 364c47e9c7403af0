"""diffusers' training loop: a UNet learns to predict noise through adapters, saved as
load_lora_weights reads them.

python benchmarks/recipes/diffusers_training.py
"""

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch.nn import functional as F

import gralora

blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
sizes = {
    "sample_size": 8,
    "block_out_channels": (16,),
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
}
unet = UNet2DConditionModel(layers_per_block=1, attention_head_dim=4, **sizes, **blocks)
gralora.inject(unet, ["to_q", "to_k", "to_v", "to_out.0", "conv1"], gralora.GraloraConfig(r=8))
optimizer, scheduler = torch.optim.AdamW(gralora.adapter_parameters(unet), lr=1e-3), DDPMScheduler()
for _ in range(3):
    latents, noise, steps = (
        torch.randn(4, 4, 8, 8),
        torch.randn(4, 4, 8, 8),
        torch.randint(1000, (4,)),
    )
    predicted = unet(
        scheduler.add_noise(latents, noise, steps), steps, torch.randn(4, 5, 16)
    ).sample
    F.mse_loss(predicted, noise).backward()
    optimizer.step()
    optimizer.zero_grad()
gralora.save_adapter(
    unet, "picture", format="diffusers"
)  # pipeline.load_lora_weights("picture"); ComfyUI: format="kohya"
