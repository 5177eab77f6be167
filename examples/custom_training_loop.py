"""Your own training loop with accelerate and this package's network and loss.

python prepare_imagenet64.py --source mnist --output_dir outputs/demo/data
accelerate launch examples/custom_training_loop.py --train_data_dir outputs/demo/data
"""

import argparse

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from imagenet64_diffusion import ClassConditionalPipeline, ClassConditionalUNet2DModel, EtaDDIMScheduler
from imagenet64_diffusion.data.dataset import PreparedImages, to_model_range
from imagenet64_diffusion.training.objectives import HybridLoss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train_data_dir", required=True, help="written by prepare_imagenet64.py")
    parser.add_argument("--output_dir", default="outputs/custom", help="the pipeline folder to write")
    parser.add_argument("--num_train_epochs", type=int, default=5)
    parser.add_argument("--train_batch_size", type=int, default=64)
    options = parser.parse_args()
    accelerator = Accelerator()
    torch.manual_seed(0)
    images = PreparedImages(options.train_data_dir)
    config = {"stem_channels": 8, "block_out_channels": (16, 32, 64), "num_class_embeds": images.num_classes}
    unet = ClassConditionalUNet2DModel(images.image_size, images.channels, **config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-3)
    # the dataset gives whole batches: {"pixel_values": uint8, "class_labels": int64}
    loader = DataLoader(images, options.train_batch_size, shuffle=True, drop_last=True, collate_fn=lambda batch: batch)
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
    scheduler = EtaDDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False)
    hybrid_loss = HybridLoss(scheduler, device=accelerator.device)

    for epoch in range(options.num_train_epochs):
        for batch in loader:
            samples = to_model_range(batch["pixel_values"])  # (batch, channels, height, width), -1 to 1
            noise = torch.randn_like(samples)
            timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(samples),), device=samples.device)
            without_class = torch.rand(len(samples), device=samples.device) < 0.2  # for classifier-free guidance
            class_labels = batch["class_labels"].masked_fill(without_class, images.num_classes)
            noisy_samples = hybrid_loss.add_noise(samples, noise, timesteps)
            output = unet(noisy_samples, timesteps, class_labels).sample  # the velocity, then the variance
            loss = hybrid_loss(output, samples, noise, noisy_samples, timesteps).total.mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f} in its last batch")

    if accelerator.is_main_process:
        pipeline = ClassConditionalPipeline(accelerator.unwrap_model(unet), scheduler, images.id2label)
        pipeline.save_pretrained(options.output_dir)


if __name__ == "__main__":
    main()
