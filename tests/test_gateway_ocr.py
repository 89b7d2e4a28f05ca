"""The shipped pipeline ``ocr``, with its real models, behind the gateway, as docs/gateway.md says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rapidocr", reason="rapidocr is not installed: pip install 'laxity[ocr]'")
pytest.importorskip("tritonclient.http", reason="pip install 'tritonclient[http]'")

from conftest import Cluster, eventually
from documented import Command, Program, read
from gateway_process import GatewayProcess
from tritonclient.http import InferenceServerClient

from nodes.device import DeviceConfig
from nodes.measured import Measured
from pipelines.load import load_spec
from pipelines.ocr.samples import draw_note

PAGE = Path(__file__).parent.parent / "docs" / "gateway.md"
LINES = ["Dear Sir,", "your invoice 4711", "is 20 days late"]


def test_the_page_reads_the_text_of_a_picture(cluster: Cluster, tmp_path: Path) -> None:
    steps = list(read(PAGE))
    commands = [step.text for step in steps if isinstance(step, Command)]
    (program,) = (step.text for step in steps if isinstance(step, Program))
    install, up, run, curl = commands
    assert install == "pip install 'laxity[gateway]'"
    assert up == "laxity up ocr --detach"  # here it is a cluster of this process, which need not measure its models
    assert run.split("#")[0].strip() == "laxity gateway run"
    (tmp_path / "receipt.png").write_bytes(draw_note(LINES))

    spec = load_spec("ocr")
    profile = {stage: [(1, 0.3), (2, 0.6)] if stage == "detect" else [(1, 0.03), (16, 0.5)] for stage in spec.stages}
    known = {(spec.model_key(stage), "cpu"): Measured(profile[stage], 0.1, 0.0) for stage in spec.stages}
    cluster.start()
    cluster.shard.apply(spec)
    agent = cluster.lone_agent([DeviceConfig("cpu", "cpu")])
    agent.agent.know(known)
    agent.hold(spec)
    agent.connect(cluster.shard.backend)
    with GatewayProcess(tmp_path / "log", "--connect", cluster.shard.frontend) as gateway:

        def follow(command: list[str]) -> str:
            done = subprocess.run(
                [word.replace("localhost:8000", gateway.http) for word in command],
                cwd=tmp_path,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        with InferenceServerClient(gateway.http) as client:
            eventually(lambda: client.is_model_ready("ocr"), "the gateway knows that ocr is ready")
        printed = follow([sys.executable, "-c", program]).splitlines()
        assert sorted(printed[:-1]) == sorted(LINES)
        assert printed[-1] == "(3, 4, 2)"
        if shutil.which("curl") is None:
            return
        answer = json.loads(follow(["bash", "-c", curl]))
        found = {output["name"]: output for output in answer["outputs"]}
        assert sorted(json.loads(line)["text"] for line in found["lines"]["data"]) == sorted(LINES)
        assert re.fullmatch(r"[0-9a-f]+-\d+", answer["parameters"]["laxity-request-id"])
