"""Flower's own floor: a do-nothing app that imports torch, takes the same bytes down and sends the same bytes up.

`write_app` puts it into a folder of its own; `flwr run` takes it like any other. Its server side asks by Flower's own
`send_and_receive`, and writes the seconds of every round to the file that FLOOR_SECONDS names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

_PROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "floor"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "floor"
fab-include = ["floor/**/*.py"]

[tool.flwr.app.components]
serverapp = "floor.server:app"
clientapp = "floor.client:app"

[tool.flwr.app.config]
rounds = 3
sites = 10
"""
_CLIENT = """\
import json
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

UP = json.loads('''{up}''')
app = ClientApp()


@app.train()
def train(message, context):
    received = message.content.array_records["tensors"].to_torch_state_dict()
    sent = {{name: torch.ones(shape) for name, shape in UP.items()}}
    content = RecordDict({{"words": ConfigRecord({{"charged": "[]"}}), "tensors": ArrayRecord(sent)}})
    return Message(content, reply_to=message)
"""
_SERVER = """\
import json
import os
import time
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

DOWN = json.loads('''{down}''')
app = ServerApp()


@app.main()
def main(grid, context):
    sites, rounds, seconds = int(context.run_config["sites"]), int(context.run_config["rounds"]), []
    while len(list(grid.get_node_ids())) < sites:
        time.sleep(0.5)
    for number in range(rounds):
        start = time.monotonic()
        arrays = ArrayRecord({{name: torch.randn(shape) for name, shape in DOWN.items()}})
        content = RecordDict({{"words": ConfigRecord({{"round": number}}), "tensors": arrays}})
        nodes = list(grid.get_node_ids())
        messages = [Message(content, dst_node_id=node, message_type="train", group_id=str(number)) for node in nodes]
        replies = list(grid.send_and_receive(messages))
        total = sum(float(r.content.array_records["tensors"].count_bytes()) for r in replies if r.has_content())
        if len([r for r in replies if r.has_content()]) < sites:
            raise RuntimeError("a site did not answer")
        seconds.append(time.monotonic() - start)
    with open(os.environ["FLOOR_SECONDS"], "w") as file:
        json.dump(seconds, file)
"""


def write_app(folder: Path, down: Mapping[str, Sequence[int]], up: Mapping[str, Sequence[int]]) -> Path:
    """Write the app.

    Args:
        folder: a new folder.
        down: names and shapes of what each site receives in a round.
        up: of what it sends.
    """
    package = folder / "floor"
    package.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(_PROJECT, encoding="utf-8")
    (package / "__init__.py").write_text("", encoding="utf-8")
    told = {name: list(shape) for name, shape in down.items()}, {name: list(shape) for name, shape in up.items()}
    (package / "server.py").write_text(_SERVER.format(down=json.dumps(told[0])), encoding="utf-8")
    (package / "client.py").write_text(_CLIENT.format(up=json.dumps(told[1])), encoding="utf-8")
    return folder
