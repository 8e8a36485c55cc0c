import base64
import json
import re
import shutil

import numpy as np
import pytest
from tests.views.test_pages import HOSTILE, Page

import everystep
from everystep.errors import StepError, UsageError
from everystep.page.regions import histogram
from everystep.page.share import MOST_STEPS, shared_report
from everystep.views.step_data import tensor_of


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("share") / HOSTILE
    return everystep.train_experiment("two-layer", {"steps": 30}, run=directory, progress=False)


@pytest.fixture(scope="module")
def report(run):
    return shared_report(run, [7, -1, 7])


def data_of(html):
    (text,) = re.findall(r'class="opened-steps">(.*?)</script>', html)
    return json.loads(text)


def test_the_steps_are_inside(run, report):
    data = data_of(report)
    assert [step["content"]["step"] for step in data["steps"]] == [7, 30]
    expected = json.loads(json.dumps(run[7].data()))
    assert data["steps"][0]["content"] == expected


def test_numbers_are_whole_or_reduced(run, report):
    data = data_of(report)
    opened = data["steps"][0]
    for id in opened["content"]["tensors"]:
        tensor = tensor_of(run[7], id, run.facts)
        assert data["histograms"][opened["histograms"][id]] == histogram(tensor)
        (kept,) = opened["regions"][id]
        content = base64.b64decode(data["numbers"][kept["numbers"]])
        numbers = np.frombuffer(content, "<f4").reshape(kept["height"], kept["width"])
        if tensor.numel() <= 4096:
            assert kept["block"] == [1, 1]
            assert np.array_equal(numbers.ravel(), tensor.numpy().ravel())
        else:
            assert max(numbers.shape) <= 96 and kept["shape"] == list(tensor.shape)
            assert np.abs(numbers).max() == tensor.abs().max().item()


def test_what_is_the_same_is_kept_once(report):
    data = data_of(report)
    assert len(set(data["numbers"])) == len(data["numbers"])
    x = [step["regions"]["batch.x"][0]["numbers"] for step in data["steps"]]
    assert x[0] == x[1]
    assert len(report) < 3_000_000


def test_the_modules_are_complete(report):
    (text,) = re.findall(r'type="importmap">(.*?)</script>', report)
    modules = json.loads(text)["imports"]
    for address in modules.values():
        kind, _, content = address.partition(",")
        assert kind == "data:text/javascript;charset=utf-8;base64"
        source = base64.b64decode(content).decode()
        assert "./" not in "".join(re.findall(r"^import .*$", source, re.MULTILINE))
        for name in re.findall(r'^import .* from "(.*)";$', source, re.MULTILINE):
            assert name in modules
    assert {"report/steps.js", "step/step.js", "shared/elements.js"} <= modules.keys()
    assert "shared/server.js" not in modules


def test_names_are_text(run, report):
    page = Page(report)
    assert "img" not in page.tags and HOSTILE in page.all_text
    policy = re.findall(r'Content-Security-Policy" content="(.*?)"', report)[0]
    assert "default-src 'none'" in policy and "data:" in policy
    assert shared_report(run, []) == run.report() and "default-src 'none'" in run.report()


def test_slices_up_to_a_limit(tmp_path):
    run = everystep.train_experiment("digits", {"steps": 2}, run=tmp_path / "run", progress=False)
    html = shared_report(run, [2])
    slices = data_of(html)["steps"][0]["regions"]
    assert len(slices["batch.x"]) == 64  # of 8 by 8 each
    assert len(slices["activations/2"]) == 96 * 96 // 64
    assert slices["batch.y"][0]["shape"] == [64]


def test_steps_that_are_not_there(run):
    for step in (0, 31, -31, 10**30):
        with pytest.raises(StepError):
            shared_report(run, [step])
    with pytest.raises(UsageError, match=f"at most {MOST_STEPS}"):
        shared_report(run, range(1, 30))


def test_the_command(run, tmp_path, everystep_command):
    shutil.copytree(run.directory, tmp_path / "runs" / "mine")
    code, out, err = everystep_command("report", "mine", "--step", 3, "--step", -1, "-o", "r.html")
    assert (code, out) == (0, "") and "r.html" in err
    steps = data_of((tmp_path / "r.html").read_text())["steps"]
    assert [step["content"]["step"] for step in steps] == [3, 30]
    code, _, err = everystep_command("report", "mine", "--step", 99, "-o", "r.html")
    assert code == 2 and "it has steps 1 to 30" in err
