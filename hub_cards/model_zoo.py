"""The table of checkpoints in the project's README, from the manifest.

python hub_cards/model_zoo.py            print it
python hub_cards/model_zoo.py README.md  write it between the file's two marks
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hub_cards.convert_published import Published, read_manifest
from hub_cards.evaluation import format_value, metric_name

BEGIN, END = (
    "<!-- model zoo: python hub_cards/model_zoo.py README.md -->",
    "<!-- end of model zoo -->",
)
RATES = {"image": "bits per pixel", "audio": "kbit/s"}
TITLES = {
    "image": "Images, ImageNet at 128 x 128",
    "audio": "Speech, LibriTTS 24 kHz, test-clean / test-other",
}


def model_zoo(published: list[Published]) -> str:
    """One table a modality, in Markdown."""
    parts = []
    for modality, title in TITLES.items():
        rows = [entry for entry in published if entry.modality == modality]
        keys = list(rows[0].evaluations[0].metrics)
        heads = ["checkpoint of the authors", "codes", RATES[modality], *map(metric_name, keys)]
        lines = [f"{title}:", "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for entry in rows:
            bits = math.log2(entry.codebook_size)
            # 8 x 8 pixels a code; 75 codes a second.
            rate = bits / 64 if modality == "image" else bits * 75 / 1000
            place = f"https://huggingface.co/{entry.source}/tree/main/{entry.folder}"
            figures = [
                " / ".join(format_value(key, e.metrics[key]) for e in entry.evaluations)
                for key in keys
            ]
            cells = [
                f"[{entry.folder}]({place})",
                f"{entry.codebook_size:,}",
                f"{rate:.3g}",
                *figures,
            ]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def write_into(path: Path, table: str) -> None:
    """Replace what stands between the marks.

    Raises:
        ValueError: if the file lacks them.
    """
    text = path.read_text()
    if BEGIN not in text or END not in text.split(BEGIN, 1)[1]:
        raise ValueError(f"{path} lacks the lines {BEGIN} and {END}")
    before, rest = text.split(BEGIN, 1)
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}")


if __name__ == "__main__":
    table = model_zoo(read_manifest())
    if len(sys.argv) > 1:
        write_into(Path(sys.argv[1]), table)
    else:
        print(table)
