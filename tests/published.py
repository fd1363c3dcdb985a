"""A miniature Stable Diffusion of random weights, made and saved by diffusers itself."""

import json

VOCABULARY = 512 + 3  # bytes, bytes that end a word, a merge, start and end
SIDE, LATENT_SIDE = 16, 8


def shake(model, seed=0):
    """Random weights, biases and norms: nothing is left at 0 or 1."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model.eval()


def write_vocabulary(folder):
    """CLIP's alphabet and one merge."""
    folder.mkdir(parents=True)
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*letters, *(c + "</w>" for c in letters), "re", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\n")
    return folder


def pipeline(folder, version=1, zero_snr=False):
    """A `StableDiffusionPipeline`, kept in `folder` under `sd`; version 2 predicts v, has heads of
    one width, and pads its texts with another token.
    """
    import diffusers
    import torch
    import transformers

    torch.set_num_threads(1)
    words = write_vocabulary(folder / "vocabulary")
    second = version == 2
    tokenizer = transformers.CLIPTokenizer.from_pretrained(
        str(words), **({"pad_token": "!"} if second else {}), model_max_length=12
    )
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=VOCABULARY, max_position_embeddings=12, hidden_size=24, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=3, hidden_act="gelu" if second else "quick_gelu",
        bos_token_id=VOCABULARY - 2, eos_token_id=VOCABULARY - 1, pad_token_id=1,
    ))
    network = diffusers.UNet2DConditionModel(
        sample_size=LATENT_SIDE, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=(2, 4) if second else 4, cross_attention_dim=24,
        use_linear_projection=second, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=SIDE, scaling_factor=0.5,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, rescale_betas_zero_snr=zero_snr,
        prediction_type="v_prediction" if second else "epsilon",
    )
    out = diffusers.StableDiffusionPipeline(
        vae=shake(vae, 1), text_encoder=shake(text, 2), tokenizer=tokenizer,
        unet=shake(network, 3), scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )
    out.set_progress_bar_config(disable=True)
    out.save_pretrained(folder / "sd")
    return out
