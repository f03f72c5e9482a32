save_dir, seed, dtype = "samples", 42, "bf16"
resolution, aspect_ratio, num_frames = "480p", "9:16", 51
model = dict(type="STDiT3-XL/2")
vae = dict(type="OpenSoraVAE_V1_2")
scheduler = dict(type="rflow", num_sampling_steps=30, cfg_scale=7.0)
