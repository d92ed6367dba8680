#!/usr/bin/env python3
"""Make the sample pictures in ``tunekit/assets/pictures`` from Fluent Emoji (3D), MIT licence.

Three small sets, for examples and tests of fine-tuning:

* ``style/``: 24 captioned pictures in one style that the bundled base does not know,
* ``style-heldout/``: 8 more of the same style, to measure on,
* ``subject/``: 6 views of one character for DreamBooth or textual inversion.

Every picture ``NAME.png`` has its caption in ``NAME.txt``. The captions use the words of the base's
own captions (the names in the ``emoji.json`` of ``emoji-datasource-google``).

    python scripts/make_sample_pictures.py --fluent FLUENT.tgz --names EMOJI_JSON
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

REPO = Path(__file__).resolve().parent.parent
FLUENT_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
NAMES_PACKAGE = "emoji-datasource-google@16.0.0"
SIZE = 128  # px
TRIGGER = ", 3d style"

# fmt: off
STYLE = [
    "1f34e", "1f34b", "1f349", "1f353", "1f955", "1f354", "1f355", "1f369",
    "1f344", "1f337", "1f33b", "1f335", "1f431", "1f43c", "1f438", "1f42c",
    "1f422", "1f989", "1f680", "1f697", "1f3e0", "1f381", "1f511", "1f388",
]
STYLE_HELDOUT = ["1f34a", "1f34c", "1f352", "1f382", "1f436", "1f427", "1f68c", "1f514"]
# fmt: on
SUBJECT = "1f98a"  # fox face
BACKGROUNDS = [  # top colour, bottom colour, width of the fox in px, shift right and down in px
    ((255, 255, 255), (255, 255, 255), 116, 0, 0),
    ((190, 225, 255), (120, 180, 240), 104, -4, 6),
    ((255, 235, 190), (255, 205, 130), 96, 8, -4),
    ((205, 240, 205), (130, 200, 140), 108, 3, 4),
    ((245, 210, 235), (215, 150, 205), 88, -10, 8),
    ((90, 95, 120), (40, 42, 66), 100, 6, 2),
]

LICENCE = """Pictures of Fluent Emoji (3D), taken from the npm package @lobehub/fluent-emoji-3d 1.1.0,
which is under the MIT License:

Copyright (c) 2023 LobeHub (packaging)
Copyright (c) Microsoft Corporation (Fluent Emoji)

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction, including
without limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is furnished to do so, subject to the
following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial
portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT
LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO
EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER
IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR
THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

README = f"""# Sample pictures

Small captioned sets to try fine-tuning with: each `NAME.png` ({SIZE} x {SIZE}) has its caption in `NAME.txt`.

| folder | pictures | for |
| --- | --- | --- |
| `style/` | {len(STYLE)} | a style LoRA or a full fine-tune; all captions end in `{TRIGGER}` |
| `style-heldout/` | {len(STYLE_HELDOUT)} | measuring it: same style, other things |
| `subject/` | {len(BACKGROUNDS)} | one fox, different backgrounds: DreamBooth, textual inversion |

Made by `scripts/make_sample_pictures.py` from Fluent Emoji 3D (MIT, see `LICENSE.txt`), composited on white
(`subject/`: on colours, scaled and shifted) and shrunk. The captions use the words of the captions that
`builtin/emoji-64` was trained on.
"""


def npm_file(package: str, given: Path | None, folder: Path) -> Path:
    """The tarball of an npm package: ``given``, or fetched to ``folder`` with ``npm pack``."""
    if given is not None:
        if not given.exists():
            raise SystemExit(f"{given}: no such file; give the tarball of {package}")
        return given
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit(
            f"npm was not found: run 'npm pack {package}' elsewhere, pass the tarball (see --help)"
        )
    command = [npm, "pack", package, "--silent"]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return folder / done.stdout.strip().splitlines()[-1]


def read_names(path: Path) -> dict[str, str]:
    """Captions by code point (``"1f34e"`` to ``"red apple"``) from ``emoji.json`` or the tarball."""
    if path.suffix == ".json":
        text = path.read_text(encoding="utf-8")
    else:
        with tarfile.open(path) as archive:
            text = archive.extractfile("package/emoji.json").read().decode("utf-8")
    return {entry["unified"].lower(): entry["name"].lower() for entry in json.loads(text) if entry["name"]}


def read_picture(archive: tarfile.TarFile, code: str) -> Image.Image:
    """One emoji (256 x 256, RGBA) by code point."""
    data = archive.extractfile(f"package/assets/{code}.webp").read()
    return Image.open(io.BytesIO(data)).convert("RGBA")


def on_gradient(
    picture: Image.Image,
    top: tuple[int, int, int],
    bottom: tuple[int, int, int],
    width: int,
    right: int,
    down: int,
) -> Image.Image:
    """Puts a picture on a vertical gradient.

    Args:
        picture: The emoji, RGBA, square.
        top: Colour of the upper edge, RGB 0..255.
        bottom: Colour of the lower edge.
        width: Width of the emoji in the result, px.
        right: Shift from the middle to the right, px.
        down: Shift from the middle down, px.

    Returns:
        The result, RGB, SIZE x SIZE.
    """
    blend = np.linspace(0, 1, SIZE)[:, None, None]
    rows = np.asarray(top) * (1 - blend) + np.asarray(bottom) * blend
    ground = Image.fromarray(np.broadcast_to(rows, (SIZE, SIZE, 3)).round().astype(np.uint8)).convert("RGBA")
    small = picture.resize((width, width), Image.Resampling.LANCZOS)
    place = ((SIZE - width) // 2 + right, (SIZE - width) // 2 + down)
    ground.alpha_composite(small, (max(0, place[0]), max(0, place[1])))
    return ground.convert("RGB")


def save(image: Image.Image, caption: str, folder: Path, name: str) -> None:
    """Writes ``folder/name.png`` and ``folder/name.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / f"{name}.png", optimize=True)
    (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")


def main() -> None:
    """Makes the three folders anew."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fluent", type=Path, help=f"tarball of {FLUENT_PACKAGE}, if npm is not to get it")
    parser.add_argument("--names", type=Path, help=f"emoji.json or tarball of {NAMES_PACKAGE}, likewise")
    parser.add_argument("--output", type=Path, default=REPO / "tunekit/assets/pictures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        fluent = npm_file(FLUENT_PACKAGE, args.fluent, Path(scratch))
        names = read_names(npm_file(NAMES_PACKAGE, args.names, Path(scratch)))
        with tarfile.open(fluent) as archive:
            for folder, codes in (("style", STYLE), ("style-heldout", STYLE_HELDOUT)):
                shutil.rmtree(args.output / folder, ignore_errors=True)
                for code in codes:
                    picture = on_gradient(read_picture(archive, code), (255,) * 3, (255,) * 3, 120, 0, 0)
                    save(picture, names[code] + TRIGGER, args.output / folder, names[code].replace(" ", "-"))
            shutil.rmtree(args.output / "subject", ignore_errors=True)
            fox = read_picture(archive, SUBJECT)
            for index, background in enumerate(BACKGROUNDS):
                save(
                    on_gradient(fox, *background), names[SUBJECT], args.output / "subject", f"fox-{index + 1}"
                )
    (args.output / "LICENSE.txt").write_text(LICENCE, encoding="utf-8")
    (args.output / "README.md").write_text(README, encoding="utf-8")
    total = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"{args.output}: {total} bytes")


if __name__ == "__main__":
    main()
