"""Names from elsewhere stay text in a card: no markup, no HTML, no code, no other front matter, no template."""

import ast
import re

import pytest
import yaml

from hub_cards.dataset_card import make_dataset_card
from hub_cards.evaluation import Evaluation
from hub_cards.tokenizer_card import make_model_card
from modeling_simvq import SimVQImageConfig, SimVQImageModel

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![](http://tracker.example/x.png)",
    "http://tracker.example/",
    "x\n---\nlicense: other\n---\n# Owned",
    "x\n```\n\n# Owned\n```python\nimport os",
    "```` ``` ` ",
    "{{ 7 * 7 }}{% for x in y %}",
    'x"); import os; os.system("true") #',
    "| a | b |",
    "# Owned",
    "a: b: [c, !!python/name:os.system",
    "\u202egnp.exe\0\x1b[31m",
    "&lt;script&gt;",
]


@pytest.fixture(scope="module")
def model():
    small = {"base_channels": 32, "channel_multipliers": [1, 2], "num_res_blocks": 1}
    return SimVQImageModel(SimVQImageConfig(**small, codebook_size=16, codebook_dim=8))


def check(text: str, python_blocks: int) -> dict:
    """The front matter of a card whose body is what the templates make of plain text."""
    parts = re.split(r"^---$\n", text, flags=re.M)
    front, body = parts[1], "".join(parts[2:])
    outside = []
    blocks = re.split(r"^(`{3,})(\w*)\n(.*?)^\1$\n?", body, flags=re.M | re.S)
    for kind, block in zip(blocks[2::4], blocks[3::4], strict=True):
        if kind == "python":
            names = {
                n.name
                for tree in ast.walk(ast.parse(block))
                if isinstance(tree, ast.Import)
                for n in tree.names
            }
            assert "os" not in names
            python_blocks -= 1
    assert python_blocks == 0
    outside = re.sub(r"`[^`\n]*`", "", "".join(blocks[::4]))
    outside = re.sub(r"\\.", "", outside)  # what is escaped is text
    assert not re.search(r"<(script|img)", outside, flags=re.I)
    assert "](javascript:" not in outside and "](http://" not in outside
    assert "tracker.example" not in outside or ":\u200b//tracker.example" in outside
    assert not re.search(r"^# Owned", outside, flags=re.M)
    assert ("7 * 7" in text) == ("{{ 7" in text)
    assert "\x1b" not in outside and "\u202e" not in outside
    return yaml.safe_load(front)


@pytest.mark.parametrize("name", HOSTILE)
def test_model_cards(name, model):
    evaluation = Evaluation(
        dataset=name, metrics={"psnr": 20.0, "utilisation": 0.5, name: 1.0}, protocol=name
    )
    text = make_model_card(
        model,
        f"me/{name}",
        evaluations=[evaluation],
        settings={"dataset": "a/b", name: name, "train_split": name},
        sample_names=[name],
        license="mit",
    )
    front = check(str(text), python_blocks=1)
    assert front["license"] == "mit"
    assert front["model-index"][0]["results"][0]["dataset"]["name"] == name


@pytest.mark.parametrize("name", HOSTILE)
def test_data_set_cards(name):
    text = make_dataset_card(
        f"me/{name}", name, {name: 3}, ["image_codes", name], codebook_size=16, source=name
    )
    front = check(str(text), python_blocks=1)
    assert front["configs"][0]["data_files"][0]["split"] == name
