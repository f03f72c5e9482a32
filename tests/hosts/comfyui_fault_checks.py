"""Faults that users met, each so that it failed before. Run by comfyui_worker.py."""
