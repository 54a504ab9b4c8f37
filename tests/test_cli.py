"""The command line: what a person types, reads and gets as exit code."""

import json
import shlex
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

from latent_engine import load_data, load_system
from latent_engine.cli import main
from latent_engine.commands import next_run, parse_train
from latent_engine.logs import JsonLines


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Forty 6×6 images of two classes: the left or the right half is bright."""
    y = np.arange(40) % 2
    x = np.random.default_rng(0).random((40, 6, 6)) * 0.4
    x[y == 0, :, :3] += 0.6
    x[y == 1, :, 3:] += 0.6
    path = tmp_path_factory.mktemp("data") / "halves.npz"
    np.savez(path, x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
    return path


@pytest.fixture
def run(data, tmp_path):
    path = tmp_path / "run"
    assert main(["train", "dgd", "--data", str(data), "--run", str(path), "--components", "4", "--epochs", "2"]) == 0
    return path


def failure(capsys, *arguments):
    """The message of a command that must fail with exit code 2, one line and no traceback."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    message = capsys.readouterr().err
    assert message.startswith("latent-engine: ") and message.count("\n") == 1
    return message


def test_help_needs_no_torch():
    code = ("import sys; from latent_engine.cli import main; assert main(['--help']) == 0; "
            "assert main(['sample', '--help']) == 0; assert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train PRESET" in done.stdout and "--component" in done.stdout


def test_a_run_from_training_to_pictures(run, data, capsys):
    assert (run / "latest").exists() and len((run / "metrics.jsonl").read_text().splitlines()) == 2
    out = run / "z.npz"
    assert main(["represent", str(run), "--data", str(data), "--steps", "5", "--out", str(out)]) == 0
    with np.load(out) as arrays:
        assert arrays["z"].shape == (20, 2) and arrays["component"].shape == (20,)
        assert arrays["y"].tolist() == [i % 2 for i in range(20)]
    assert main(["sample", str(run), "--n", "7"]) == 0 and (run / "samples.png").stat().st_size > 500
    assert main(["evaluate", str(run), "--data", str(data)]) == 0
    scores = json.loads((run / "scores.json").read_text())
    assert 0.5 <= scores["purity"] <= 1 and scores["test_nll"] > 0
    assert "purity of the components" in capsys.readouterr().out
    assert main(["explore", str(run), "--data", str(data)]) == 0
    files = capsys.readouterr().out.split()
    assert files[-1] == str(run / "explorer.html") and all(run.joinpath(f).stat().st_size > 500 for f in files)


def test_evaluate_leaves_out_votes_of_ten_neighbours_among_few_rows(tmp_path):
    path, run = tmp_path / "few.npz", tmp_path / "few"
    x = np.random.default_rng(0).random((6, 4, 4)).astype(np.float32)
    np.savez(path, x_train=x, y_train=np.arange(6) % 2, x_test=x, y_test=np.arange(6) % 2)
    assert main(["train", "dgd", "--data", str(path), "--run", str(run), "--epochs", "1"]) == 0
    assert main(["evaluate", str(run), "--data", str(path)]) == 0
    scores = json.loads((run / "scores.json").read_text())
    assert "test_nll" in scores and "knn" not in scores


def test_gray_images_stay_gray(data, tmp_path):
    run, x = tmp_path / "gray", np.load(data)["x_test"]
    assert main(["train", "dgd", "--data", str(data), "--run", str(run), "--binarize", "none", "--epochs", "2"]) == 0
    assert main(["evaluate", str(run), "--data", str(data)]) == 0
    scores = json.loads((run / "scores.json").read_text())
    mean = np.load(data)["x_train"].mean(0)
    expected = -(x * np.log(mean) + (1 - x) * np.log(1 - mean)).sum((1, 2)).mean()
    assert scores["mean_image_nll"] == pytest.approx(expected, rel=1e-4)
    assert main(["represent", str(run), "--data", str(data), "--out", str(run / "z.npz")]) == 0
    z = load_system(run).represent(torch.tensor(x, dtype=torch.float32)[:, None], steps=20).numpy()
    assert np.allclose(np.load(run / "z.npz")["z"], z, atol=1e-4)


def test_dynamic_pixels_and_averaged_weights_are_kept_by_the_run(data, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", "dgd", "--data", str(data), "--run", str(run), "--binarize", "dynamic", "--epochs", "2",
                 "--ema-decay", "0.9", "--clip-norm", "5"]) == 0
    assert json.loads((run / "config.json").read_text())["data"]["binarized"] == "dynamic"
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", str(data)]) == 0
    assert capsys.readouterr().err == "Weights: epoch 2, averaged (EMA)\n"
    system, test = load_system(run), load_data(data, "test").pixels("static")
    z = system.represent(test.x, batch_size=250)
    expected = -system.likelihood.log_prob(system.decoder(z), test.x).mean().item()
    assert json.loads((run / "scores.json").read_text())["test_nll"] == pytest.approx(expected, rel=1e-5)


def test_validation_needs_a_system_that_has_one(data, tmp_path, capsys):
    train = ["train", "dgd", "--data", data, "--run", tmp_path / "run"]
    assert "DGD learns a representation of each" in failure(capsys, *train, "--validation", "0.1", "--patience", "3")
    assert "patience needs rows to validate on" in failure(capsys, *train, "--patience", "3")
    assert not (tmp_path / "run").exists()


def test_samples_depend_on_seed_and_component_only(run, tmp_path):
    def sample(*flags):
        assert main(["sample", str(run), "--n", "5", "--out", str(tmp_path / "x.npz"), *flags]) == 0
        return np.load(tmp_path / "x.npz")["x"]

    assert sample().shape == (5, 1, 6, 6)
    assert np.array_equal(sample("--seed", "3"), sample("--seed", "3"))
    assert not np.array_equal(sample("--seed", "3"), sample("--seed", "4"))
    assert not np.array_equal(sample("--component", "0"), sample("--component", "1"))


@pytest.mark.parametrize("preset", ["ae", "vae"])
def test_samples_of_a_mixture_fitted_to_the_representations(data, tmp_path, capsys, preset):
    run, out = tmp_path / "run", tmp_path / "x.npz"
    assert main(["train", preset, "--data", str(data), "--run", str(run), "--latent-dim", "3", "--batch-size", "20",
                 "--epochs", "40"]) == 0
    train = torch.tensor(np.load(data)["x_train"]).round().flatten(1)

    def distance(*flags):
        assert main(["sample", str(run), "--n", "50", "--out", str(out), *flags]) == 0
        return torch.cdist(torch.tensor(np.load(out)["x"]).flatten(1).double(), train).min(1).values.mean().item()

    near, normal = distance("--mixture", "2", "--data", str(data), "--covariance", "diagonal"), distance()
    assert near < (0.9 if preset == "ae" else 1.1) * normal
    assert "nats a representation after" in capsys.readouterr().err
    first = distance("--mixture", "2", "--data", str(data), "--seed", "3")
    assert first == distance("--mixture", "2", "--data", str(data), "--seed", "3", "--covariance", "full")
    assert "components must be at least 1, given 0" in failure(capsys, "sample", run, "--mixture", 0, "--data", data)
    assert "of the mixture that --mixture asks for" in failure(capsys, "sample", run, "--covariance", "full")


def test_a_dgd_has_a_prior_of_its_own(run, data, capsys):
    assert "--mixture is for models with an encoder" in failure(capsys, "sample", run, "--mixture", 2, "--data", data)


def test_flags_override_the_file_which_overrides_the_preset(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text("components = 30\nbinarize = 'dynamic'\nlog_precision_mean = -1.5\nepochs = 7\n"
                    "[optim.decoder]\nlr = 0.5\nbetas = [0.5, 0.7]\n")
    options = parse_train("dgd", ["--epochs", "9", "--config", str(file), "--optim.prior.lr", "0.2"])
    assert (options.model.components, options.binarize, options.model.log_precision_mean) == (30, "dynamic", -1.5)
    assert (options.train.epochs, options.train.batch_size, options.model.latent_dim) == (9, 32, 2)
    assert (options.model.optim.decoder.lr, options.model.optim.decoder.betas) == (0.5, (0.5, 0.7))
    assert (options.model.optim.prior.lr, options.model.optim.latents.lr) == (0.2, 0.01)
    (tmp_path / "settings.json").write_text('{"components": 11, "optim": {"decoder": {"lr": 0.25}}}')
    options = parse_train("dgd", [f"--config={tmp_path / 'settings.json'}"])
    assert (options.model.components, options.model.optim.decoder.lr) == (11, 0.25)


@pytest.mark.parametrize(("content", "message"), [
    ("componnents = 3", "components"), ("prior = 'cauchy'", "mixture"), ("epochs = 'many'", "int"),
    ("binarize = 'yes'", "--binarize"), ("binarize = true", "--binarize"), ("normalize = 1", "--normalize"),
    ("optim = 3", "--optim")])
def test_mistakes_in_a_config_file(tmp_path, capsys, content, message):
    file = tmp_path / "settings.toml"
    file.write_text(content)
    assert main(["train", "dgd", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert message in error and f"{file} has a setting that does not fit" in error


def test_unreadable_config_files(tmp_path, capsys):
    file = tmp_path / "settings.toml"
    assert "there is no file" in failure(capsys, "train", "dgd", "--config", file)
    file.write_text("components = = 3")
    assert "cannot be read as TOML" in failure(capsys, "train", "dgd", "--config", file)
    assert ".toml or .json" in failure(capsys, "train", "dgd", "--config", "settings.yaml")


def test_only_a_file_that_can_be_written_is_begun(run, data, tmp_path, capsys):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for out in (tmp_path / "nowhere" / "x.npz", data / "x.npz", tmp_path / "folder.npz"):
        (tmp_path / "folder.npz").mkdir(exist_ok=True)
        for command in (["sample", run], ["represent", run, "--data", data]):
            assert f"--out {out} cannot be written" in failure(capsys, *command, "--out", out)
    assert "takes a .npz file" in failure(capsys, "represent", run, "--data", data, "--out", tmp_path / "z.png")
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


FULL_DISK = """
    import resource, sys
    from latent_engine.cli import main

    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))  # no file may grow beyond this: writing fails as on a full disk
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
@pytest.mark.parametrize(("command", "file"), [("sample", "samples.png"), ("explore", "samples.png")])
def test_a_full_disk_leaves_the_pictures_that_were_there(run, data, command, file):
    (run / file).write_bytes(b"earlier")
    given = [] if command == "sample" else ["--data", str(data)]
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(FULL_DISK), command, str(run), *given],
                          capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"latent-engine: {run / file} cannot be written (File too large)\n" in done.stderr
    assert (run / file).read_bytes() == b"earlier" and not list(run.glob(".*"))


def test_mistyped_verbs_presets_and_data(capsys, tmp_path):
    assert "unknown verb 'trian' (did you mean 'train'?)" in failure(capsys, "trian")
    assert "train needs a preset first; the presets are dgd," in failure(capsys, "train")
    assert "train needs a preset first; the presets are dgd," in failure(capsys, "train", "--epochs", 3)
    assert "--resume needs --run" in failure(capsys, "train", "dgd", "--resume")
    assert "unknown preset 'dgd-labeled' (did you mean 'dgd-labelled'?)" in failure(capsys, "train", "dgd-labeled")
    assert "Did you mean 'mnist5k'?" in failure(capsys, "train", "dgd", "--data", "mnist5")
    assert "epochs must be at least 0, given -1" in failure(capsys, "train", "dgd", "--epochs", -1)
    assert "No trained system in" in failure(capsys, "sample", tmp_path / "nothing")
    assert main(["train", "dgd", "--compnents", "3"]) == 2
    assert "--components" in capsys.readouterr().err


def test_a_run_is_never_overwritten(run, data, capsys):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    again = ["train", "dgd", "--data", data, "--run", run, "--epochs", "1"]
    assert "already holds a run" in failure(capsys, *again, "--components", "4")
    assert "components: 4 there, 5 given" in failure(capsys, *again, "--components", "5", "--resume")
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_damaged_and_unwritable_runs(run, data, capsys):
    weights = next(run.glob("step_*/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    assert "model.safetensors is damaged" in failure(capsys, "sample", run)
    (run / "config.json").write_text("{")
    assert "cannot be read as JSON" in failure(capsys, "sample", run)
    assert "cannot be written" in failure(capsys, "train", "dgd", "--data", data, "--run", weights / "below")


def test_evaluation_wants_the_rows_of_the_training(run, capsys):
    assert "keeps the name 'halves' only: give a path with --data" in failure(capsys, "evaluate", run)
    assert "was trained on; give their name or path with --data" in failure(
        capsys, "evaluate", run, "--data", "synthetic")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there(data, capsys):
    assert "torch sees no CUDA device" in failure(capsys, "train", "dgd", "--data", data, "--device", "cuda")


def test_new_runs_are_numbered(tmp_path):
    assert next_run("dgd", tmp_path / "runs").name == "dgd-1"
    for name in ("dgd-2", "dgd-10", "dgd-labelled-99", "dgd-x"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert next_run("dgd", tmp_path / "runs").name == "dgd-11"


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_keeps_the_run_and_says_how_to_resume(data, tmp_path):
    command = [sys.executable, "-m", "latent_engine", "train", "dgd", "--data", str(data), "--epochs", "100000"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with Ctrl-C ignored
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    run = tmp_path / "runs" / "dgd-1"
    records = JsonLines(run / "metrics.jsonl")
    deadline = time.monotonic() + 60
    while not records.read() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in message
    again = shlex.split(next(line for line in message.splitlines() if "--resume" in line))
    assert again[:3] == ["latent-engine", "train", "dgd"] and again[-3:] == ["--run", "runs/dgd-1", "--resume"]
    epochs = records.read()[-1]["epoch"]
    command = [sys.executable, "-m", "latent_engine", *again[1:], "--epochs", str(epochs + 2)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [record["epoch"] for record in records.read()] == list(range(1, epochs + 3))


def test_doctor_and_list(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for expected in ("torch", "threads", "C++", "CUDA", "gmm_log_prob", "reference   any device"):
        assert expected in text
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert "dgd-labelled" in text and "5000 + 1000 images of 1×28×28" in text and "gmm_log_prob" in text
    assert main(["doctor", "--nothing"]) == 2


def test_bench_is_forwarded(capsys):
    assert main(["bench", "nothing"]) == 2
    assert "unknown suite 'nothing'" in capsys.readouterr().err
