from open_sora_toys import STDiT3  # noqa: F401
