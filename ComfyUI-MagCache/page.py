"""Messages and plans of the nodes: on the node in the page, and on the console."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from .common.schedule import Schedule

WIDTH, HEIGHT, STRIP = 300, 56, 16  # of the picture, and of the strip at its bottom, in SVG units


class Speaker:
    """Shows messages on one node. The page gets all messages of the run, the console only the new one.

    hidden: the hidden inputs of the node; None: the node runs in a script, without a page.
    """

    def __init__(self, hidden: Any) -> None:
        self.node = hidden and hidden.unique_id
        self.texts: list[str] = []
        self.picture = ""

    def __call__(self, text: str, picture: str = "", begin: bool = False) -> None:
        """Show a message. picture: of the plan, as SVG; begin: whether a run begins, with new messages and picture."""
        logging.info(text)
        if begin:
            self.texts, self.picture = [], picture
        self.texts.append(text)
        from server import PromptServer

        server = getattr(PromptServer, "instance", None)
        if server is not None and self.node is not None:
            shown = {"node": self.node, "text": "\n".join(self.texts), "picture": self.picture}
            server.send_sync("magcache", shown, server.client_id)


def picture(schedule: Schedule, levels: np.ndarray) -> str:
    """A plan as SVG: one box per step, filled if it computes, and above them the noise levels (steps,), in 0..1."""
    steps = len(levels)
    wide, top = WIDTH / steps, HEIGHT - STRIP
    boxes = [
        f'<rect x="{step * wide + 0.5:.1f}" y="{top}" width="{max(1, wide - 1):.1f}" height="{STRIP}" rx="1.5" '
        f'fill="{"none" if reuse else "#4a90d9"}" stroke="#4a90d9"/>'
        for step, reuse in enumerate(schedule.reuse)
    ]
    points = [((step + 0.5) * wide, 4 + (1 - level) * (top - 8)) for step, level in enumerate(levels)]
    lines = [
        f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{next_x:.1f}" y2="{next_y:.1f}" stroke="#e09f3e" stroke-width="1.5"/>'
        for (x, y), (next_x, next_y) in zip(points, points[1:])
    ]
    title = f"{schedule.computed} of {steps} steps compute (filled); the line is the noise level"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="100%"><title>{title}</title>'
        f"{''.join(boxes + lines)}</svg>"
    )
