"""What ``advmed doctor`` looks at in Ultralytics: where its settings lie, and where they put runs and data."""

from __future__ import annotations

import json
import os

from advmed.cli.doctor import Page, ask

TITLE = "Ultralytics"
SETTINGS = """
import json
from ultralytics.utils import SETTINGS, SETTINGS_FILE
print()
print(json.dumps({"settings": str(SETTINGS_FILE), **{name: str(SETTINGS[name]) for name in FOLDERS + OTHERS}}))
"""
FOLDERS = ["datasets_dir", "weights_dir", "runs_dir"]
OTHERS = ["sync", "tensorboard", "wandb"]


def examine(page: Page) -> None:
    """Adds the host's settings to the page."""
    lines, ended = ask(f"FOLDERS, OTHERS = {FOLDERS}, {OTHERS}\n{SETTINGS}")
    for name in ("YOLO_CONFIG_DIR", "YOLO_OFFLINE"):
        page.add(TITLE, name, os.environ.get(name, "not set"))
    if ended:  # said where it is imported
        page.add(TITLE, "settings", ended)
        return
    found = json.loads(lines[-1])
    page.folder(TITLE, "folder of settings", os.path.dirname(found.pop("settings")))
    for name, value in found.items():
        page.add(TITLE, name, value)
