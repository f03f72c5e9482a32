"""FramePack's own Gradio demo with MagCache in its page: the same flags, the same files, about two times faster.

    python magcache_demo_gradio.py --server 127.0.0.1 --port 7860

Lies beside demo_gradio.py in a FramePack checkout, with `common/`.
"""

from common.framepack_page import main

# What the sliders start at: bound on the accumulated error, most reuses in a row, share of the steps that always
# computes.
SETTINGS = (0.10, 3, 0.2)
PUBLISHED = "framepack"  # ratio table (common/presets) of lllyasviel/FramePackI2V_HY
UPSTREAM, FOLDER, PAGE = "FramePack", "MagCache4FramePack", "demo_gradio"

if __name__ == "__main__":
    main(globals())
