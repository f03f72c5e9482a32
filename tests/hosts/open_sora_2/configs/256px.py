save_dir, seed, plugin = "samples", 42, "zero2"
sampling_option = dict(width=32, height=16, num_frames=5, num_steps=12, seed=None, guidance=3.0)
