"""Latent tables and their optimizers: against dense torch.optim in float64, in files larger than memory, through a kill."""

import copy
import pickle
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from latent_engine import DGD, Batch, Data, DGDConfig, OptimizerConfig, TrainConfig, fit, load_system
from latent_engine.checkpoint import load_optimizer_tensors, optimizer_tensors, read_tensors
from latent_engine.data import batch_order
from latent_engine.latents import CatchUpAdam, EpochAdam, LatentTable, RowAdam, RowSGD, mapped
from latent_engine.trainer import _Average, make_optimizers

ROWS, DIM = 30, 3


def start(dtype=torch.float64):
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0), dtype=dtype)


def batches(steps, size=5, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(ROWS - 4, (size,), generator=g) for _ in range(steps)]  # with repetitions; four rows are never seen


def loss_of(z):
    """Its gradient depends on the rows, so one that is read too early goes astray."""
    return (z.sin() * torch.arange(1.0, DIM + 1)).sum() + z.pow(4).sum() / 10


def rate(t):
    return 0.05 / (1 + t % 4)


def train(optimizer, read, index, first=0):
    """A step a batch, with another learning rate each."""
    for t, rows in enumerate(index, first):
        for group in optimizer.param_groups:
            group["lr"] = rate(t)
        loss_of(read(rows)).backward()
        optimizer.step()
        optimizer.zero_grad()


def dense(kind, index, dtype=torch.float64, **options):
    """The table after dense steps by PyTorch."""
    table = nn.Parameter(start(dtype))
    train(kind([table], **options), lambda rows: table[rows], index)
    return table.detach()


@pytest.mark.parametrize("options", [{}, {"betas": (0.5, 0.7)}, {"weight_decay": 0.1}, {"betas": (0.0, 0.9), "eps": 1e-3}],
                         ids=["default", "published", "decay", "no momentum"])
def test_catch_up_adam_is_dense_adam(options):
    index, table = batches(300), LatentTable(start())
    train(CatchUpAdam(table.parameters(), **options), table, index)
    kind = torch.optim.AdamW if "weight_decay" in options else torch.optim.Adam
    torch.testing.assert_close(table.z, dense(kind, index, **options), rtol=1e-11, atol=1e-11)


def test_catch_up_adam_is_as_near_the_truth_as_dense_adam_in_float32():
    index, table = batches(300), LatentTable(start().float())
    train(CatchUpAdam(table.parameters()), table, index)
    exact = dense(torch.optim.Adam, index)
    # From the same float32 start, whose rounding is not the optimizer's.
    errors = [(z.double() - exact).norm() for z in (table.z, dense(torch.optim.Adam, index, torch.float32))]
    assert errors[0] <= 2 * errors[1] + 4 * torch.finfo(torch.float32).eps * exact.norm()


def test_rows_can_be_looked_at_along_the_way():
    index, table = batches(40), LatentTable(start())
    optimizer = CatchUpAdam(table.parameters())
    for t in range(0, 40, 8):
        train(optimizer, table, index[t:t + 8], t)
        expected = dense(torch.optim.Adam, index[:t + 8])
        some = torch.tensor([29, 3, 3, 11])
        torch.testing.assert_close(table(some).detach(), expected[some], rtol=1e-12, atol=1e-12)
        whole = {0: lambda: table.z, 8: lambda: table.state_dict()["h"], 16: lambda: table.learned}.get(t)
        if whole:
            torch.testing.assert_close(whole(), expected, rtol=1e-12, atol=1e-12)


def test_a_gradient_of_rows_that_were_not_read_through_the_table():
    index, weight = batches(60), nn.Parameter(start())
    optimizer = CatchUpAdam([weight])
    for rows in index:
        weight.grad = torch.sparse_coo_tensor(rows[None], torch.ones(len(rows), DIM, dtype=weight.dtype), weight.shape)
        optimizer.step()
    optimizer.end_epoch()
    table = nn.Parameter(start())
    steps = torch.optim.Adam([table], lr=1e-2)
    for rows in index:
        table.grad = torch.zeros_like(table).index_add_(0, rows, torch.ones(len(rows), DIM, dtype=table.dtype))
        steps.step()
    torch.testing.assert_close(weight, table, rtol=1e-12, atol=1e-12)


def test_betas_may_change_along_the_way():
    index, table, other = batches(60), LatentTable(start()), nn.Parameter(start())
    pair = (CatchUpAdam(table.parameters()), table), (torch.optim.Adam([other]), lambda rows: other[rows])
    for optimizer, read in pair:
        train(optimizer, read, index[:30])
        optimizer.param_groups[0]["betas"] = (0.8, 0.95)
        train(optimizer, read, index[30:], 30)
    torch.testing.assert_close(table.z, other.detach(), rtol=1e-11, atol=1e-11)


def test_averaged_weights_are_those_of_dense_adam():
    index, table, other = batches(20), LatentTable(start()), nn.ParameterList([start()])
    pair = (CatchUpAdam(table.parameters()), table, table), (torch.optim.Adam(other), lambda rows: other[0][rows], other)
    found = []
    for optimizer, read, module in pair:
        average = _Average(module, 0.9)
        for t, rows in enumerate(index):
            train(optimizer, read, [rows], t)
            average.update()
        found += average.tensors.values()
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_an_optimizer_leaves_its_rows_to_the_next_one_caught_up():
    index, table = batches(40), LatentTable(start())
    train(CatchUpAdam(table.parameters()), table, index[:20])
    expected = dense(torch.optim.Adam, index[:20])
    optimizer = CatchUpAdam(table.parameters(), betas=(0.5, 0.7))
    torch.testing.assert_close(table.h.detach(), expected, rtol=1e-12, atol=1e-12)
    train(optimizer, table, index[20:], 20)
    other = nn.Parameter(expected)
    train(torch.optim.Adam([other], betas=(0.5, 0.7)), lambda rows: other[rows], index[20:], 20)
    torch.testing.assert_close(table.z, other.detach(), rtol=1e-11, atol=1e-11)


def test_loaded_rows_do_not_make_the_moves_of_those_before_them():
    table = LatentTable(start())
    train(CatchUpAdam(table.parameters()), table, batches(5))
    table.load_state_dict({"h": torch.ones(ROWS, DIM)})
    assert (table.z == 1).all()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda table: pickle.loads(pickle.dumps(table))], ids=["copy", "pickle"])
def test_copies_are_caught_up_and_go_their_own_way(how):
    table = LatentTable(start())
    optimizer = CatchUpAdam(table.parameters())
    train(optimizer, table, batches(5))
    alone = how(table)
    expected = alone.z.clone()
    assert torch.equal(expected, table.z)
    train(optimizer, table, batches(5))
    assert torch.equal(alone.z, expected)


@pytest.mark.parametrize("decoupled", [False, True])
def test_row_adam_is_adam_for_each_row_alone(decoupled):
    index, options = batches(40), {"weight_decay": 0.1}
    table, rows = LatentTable(start()), [nn.Parameter(row) for row in start()]
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    steps = [kind([row], **options) for row in rows]
    train(RowAdam(table.parameters(), decoupled_weight_decay=decoupled, **options), table, index)
    for t, chosen in enumerate(index):
        for i in chosen.unique():
            steps[i].param_groups[0]["lr"] = rate(t)
            loss_of(rows[i].expand((chosen == i).sum(), DIM)).backward()
            steps[i].step()
            steps[i].zero_grad()
    torch.testing.assert_close(table.z, torch.stack([row.detach() for row in rows]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}],
                         ids=["plain", "coupled", "decoupled"])
def test_epoch_adam_is_dense_adam_on_the_gradient_of_an_epoch(options):
    table, other = LatentTable(start()), nn.Parameter(start())
    row_steps, steps = EpochAdam(table.parameters(), lr=0.05, **options), torch.optim.Adam([other], lr=0.05, **options)
    for epoch in range(6):
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch))[:-3].split(4)
        before = table.z.clone()
        for rows in order:
            loss_of(table(rows)).backward()
            row_steps.step()
            row_steps.zero_grad()
            loss_of(other[rows]).backward()
        assert torch.equal(table.z, before)
        row_steps.end_epoch()
        row_steps.end_epoch()  # without a gradient nothing moves
        steps.step()
        steps.zero_grad()
        torch.testing.assert_close(table.z, other.detach(), rtol=1e-12, atol=1e-12)


OPTIMIZERS = {"sgd": RowSGD, "lazy": RowAdam, "catch up": CatchUpAdam, "epoch": EpochAdam}


@pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("by", ["state_dict", "checkpoint"])
def test_state_survives_a_change_of_process(kind, by):
    """Both go on from the same bits, and end with the same."""
    index, first = batches(40), LatentTable(start())
    one = kind(first.parameters())
    train(one, first, index[:20])
    one.end_epoch()
    second = LatentTable(torch.zeros(ROWS, DIM, dtype=torch.float64))
    other = kind(second.parameters())
    train(other, second, index[:3])  # whatever was there before
    second.load_state_dict(first.state_dict())
    if by == "state_dict":
        other.load_state_dict(one.state_dict())
    else:
        systems = nn.ModuleDict({"latents": first}), nn.ModuleDict({"latents": second})
        other = kind(second.parameters())
        load_optimizer_tensors(systems[1], {"latents": other}, optimizer_tensors(systems[0], {"latents": one}), "file")
    for table, optimizer in ((first, one), (second, other)):
        train(optimizer, table, index[20:], 20)
        optimizer.end_epoch()
    assert torch.equal(first.z, second.z)
    assert all(torch.equal(a, b) for a, b in zip(one.state[first.h].values(), other.state[second.h].values(), strict=True))


def test_step_counts_of_an_older_layout_are_read():
    """They were floats [N, 1]."""
    table = LatentTable(start())
    optimizer = RowAdam(table.parameters())
    steps = torch.arange(ROWS, dtype=torch.float64)[:, None]
    tensors = {"optim.latents.h:step": steps, "optim.latents.h:exp_avg": torch.ones(ROWS, DIM, dtype=torch.float64)}
    load_optimizer_tensors(nn.ModuleDict({"latents": table}), {"latents": optimizer}, tensors, "file")
    assert torch.equal(optimizer.state[table.h]["step"], torch.arange(ROWS, dtype=torch.int32))


def test_groups_have_settings_of_their_own():
    tables = [LatentTable(start()), LatentTable(start())]
    optimizer = CatchUpAdam([{"params": tables[0].parameters(), "lr": 0.1}, {"params": tables[1].parameters(), "lr": 0.0}])
    for table in tables:
        loss_of(table(torch.arange(3))).backward()
    optimizer.step()
    assert not torch.equal(tables[0].z, start()) and torch.equal(tables[1].z, start())


@pytest.mark.parametrize(("make", "words"), [
    (lambda p: CatchUpAdam(p, weight_decay=0.1, decoupled_weight_decay=False), "has no closed form .* or use RowAdam"),
    (lambda p: RowAdam([nn.Parameter(torch.zeros(3))]), r"RowAdam steps the rows of tables \[N, D\], given a parameter \[3\]"),
    (lambda p: RowSGD(p).step(lambda: None), "RowSGD takes no closure"),
])
def test_mistakes_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make(LatentTable(start()).parameters())


@pytest.mark.parametrize("room", [0, 1, 2])
@pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_table_in_a_file_is_trained_as_one_in_memory(kind, room, tmp_path):
    index, inside = batches(30), LatentTable(start())
    outside = LatentTable(mapped(tmp_path / "table", (ROWS, DIM), torch.float64, room=room).copy_(start()))
    optimizers = [kind(table.parameters()) for table in (inside, outside)]
    for table, optimizer in zip((inside, outside), optimizers, strict=True):
        train(optimizer, table, index)
        optimizer.end_epoch()
    assert torch.equal(inside.z, outside.z)
    state = optimizers[1].state[outside.h]
    beside, apart = kind.row_state[:room], {*kind.row_state[room:], *(name for name in state if name == "step")}
    assert {p.name for p in tmp_path.iterdir()} == {"table", *(f"table.{name}" for name in apart)}
    size = ROWS * (1 + room) * DIM
    on_disk = torch.from_file(str(tmp_path / "table"), size=size, dtype=torch.float64).view(ROWS, 1 + room, DIM)
    for place, tensor in enumerate((inside.z, *(state[name] for name in beside))):
        assert torch.equal(on_disk[:, place], tensor)

    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for name, tensor in optimizers[1].state[outside.h].items():
        assert tensor.untyped_storage().filename == str(tmp_path / (f"table.{name}" if name in apart else "table"))


def test_a_second_optimizer_of_a_table_in_a_file_starts_from_zeros_beside_the_first(tmp_path):
    table = LatentTable(mapped(tmp_path / "table", (ROWS, DIM)))
    first = RowAdam(table.parameters())
    train(first, table, batches(3))
    held = {name: kept.clone() for name, kept in first.state[table.h].items()}
    second = RowAdam(table.parameters())
    assert not any(kept.any() for kept in second.state[table.h].values())
    train(second, table, batches(3))
    assert all(torch.equal(kept, held[name]) for name, kept in first.state[table.h].items())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["copy", "pickle"])
def test_a_copy_of_a_table_in_a_file_is_in_memory(copied, tmp_path):
    table = LatentTable(mapped(tmp_path / "table", (ROWS, DIM)).normal_())
    train(RowAdam(table.parameters()), table, batches(3))
    other = copied(table)
    assert torch.equal(other.h, table.h) and other.h.untyped_storage().filename is None
    state = RowAdam(other.parameters()).state[other.h]
    assert all(kept.untyped_storage().filename is None for kept in state.values())


def test_a_file_that_does_not_fit_the_disk_is_refused(tmp_path):
    with pytest.raises(OSError):
        mapped(tmp_path / "table", (2**50, 64))


def test_a_mapped_table_of_another_shape_is_refused_and_touches_no_file(tmp_path):
    path = tmp_path / "table"
    path.write_text("kept")
    with pytest.raises(ValueError, match=r"has a shape \[N, D\], given \[30\]"):
        mapped(path, (ROWS,))
    with pytest.raises(ValueError, match="must be at least 0, given -1"):
        mapped(path, (ROWS, DIM), room=-1)
    assert path.read_text() == "kept"


def test_a_table_in_a_file_stays_there_when_its_module_moves(tmp_path):
    inside, outside = LatentTable(start()), LatentTable(mapped(tmp_path / "table", (ROWS, DIM)))
    nn.ModuleList([inside, outside]).to("meta")
    assert inside.h.is_meta
    assert outside.h.device.type == "cpu" and outside.h.untyped_storage().filename == str(tmp_path / "table")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_pinned_table_is_trained_beside_the_device(clip_norm, data):
    found = []
    for place in (torch.Tensor.cuda, torch.Tensor.pin_memory):
        system = new(LatentTable(place(torch.zeros(50, 2)))).cuda()
        fit(system, data, TrainConfig(epochs=2, batch_size=8, clip_norm=clip_norm), progress=False)
        found.append(system.latents.z)
    assert found[1].is_pinned()
    torch.testing.assert_close(found[1], found[0].cpu(), rtol=1e-3, atol=1e-4)


def new(table=None, name="row_adam_catch_up"):
    torch.manual_seed(0)
    optim = type(DGDConfig().optim)(latents=OptimizerConfig(name, lr=0.05))
    return DGD(DGDConfig(components=3, optim=optim), 50, (1, 4, 4), latents=table)


@pytest.fixture
def data():
    return Data(torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0)).round())


@pytest.mark.parametrize("name", ["row_adam", "row_adam_catch_up", "row_adam_epoch"])
def test_a_dgd_learns_with_each_of_them_and_resumes_to_the_same_bits(name, data, tmp_path):
    whole, parts = new(name=name), new(name=name)
    records = fit(whole, data, TrainConfig(epochs=6, batch_size=8), run_dir=tmp_path / "whole", progress=False)
    assert records[-1]["total"] < records[0]["total"]
    fit(parts, data, TrainConfig(epochs=3, batch_size=8), run_dir=tmp_path / "parts", progress=False)
    parts = new(name=name)
    fit(parts, data, TrainConfig(epochs=6, batch_size=8), run_dir=tmp_path / "parts", resume=True, progress=False)
    assert torch.equal(whole.latents.z, parts.latents.z)
    assert torch.equal(load_system(tmp_path / "whole").latents.z, whole.latents.z)


class DenseTable(nn.Module):
    """A latent table with dense gradients."""

    def __init__(self, h):
        super().__init__()
        self.h, self.transform = nn.Parameter(h), nn.Identity()

    def forward(self, index):
        return self.h[index]


def test_a_dgd_that_catches_up_is_one_with_a_dense_optimizer(data):
    """In float64, where the decoder and the prior see the same rows too."""
    sparse, other = new().double(), new(name="adam").double()
    other.latents = DenseTable(other.latents.h.detach().clone())
    for system in (sparse, other):
        optimizers = set(make_optimizers(system, system.phases()).values())
        for index in batch_order(50, 8, 0, 1) + batch_order(50, 8, 0, 2):
            system.loss(Batch(data.x[index].double(), index))["total"].backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    torch.testing.assert_close(sparse.latents.z, other.latents.h.detach(), rtol=1e-9, atol=1e-9)


def test_a_table_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"latents must be a table of \[rows, latent_dim\] = \[50, 2\], given \[9, 2\]"):
        new(LatentTable(torch.zeros(9, 2)))


RUN = """
    import sys, time
    import torch
    from latent_engine import DGD, Batch, Data, DGDConfig, OptimizerConfig, TrainConfig, fit
    from latent_engine.latents import LatentTable, mapped

    torch.set_num_threads(1)
    data = Data(torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0)).round())
    torch.manual_seed(0)
    table = LatentTable(mapped(sys.argv[2], (50, 2)).normal_())
    optim = type(DGDConfig().optim)(latents=OptimizerConfig("row_adam_catch_up", lr=0.05))
    system = DGD(DGDConfig(components=3, optim=optim), 50, (1, 4, 4), latents=table)
    if "slow" in sys.argv:
        system.after_step = lambda step: (print(step, flush=True), time.sleep(0.02))
    fit(system, data, TrainConfig(epochs=4, batch_size=5), run_dir=sys.argv[1], resume=True, progress=False)
"""


def test_a_kill_in_mid_epoch_loses_nothing_that_the_last_checkpoint_held(tmp_path):
    """The table's files hold rows of the interrupted epoch; the run goes on from the checkpoint, to the same bits."""

    def run(name, *arguments):
        paths = str(tmp_path / name), str(tmp_path / f"{name}.table")
        return subprocess.Popen([sys.executable, "-c", textwrap.dedent(RUN), *paths, *arguments], stdout=subprocess.PIPE,
                                text=True)

    peaceful, killed = run("peaceful"), run("killed", "slow")
    for line in killed.stdout:
        if int(line) == 24:  # of ten steps an epoch
            killed.send_signal(signal.SIGKILL)
            break
    assert killed.wait() == -signal.SIGKILL and peaceful.wait() == 0
    assert (tmp_path / "killed" / "latest").read_text() == "step_000020\n"
    held = read_tensors(tmp_path / "killed" / "step_000020" / "model.safetensors")["latents.h"]
    torn = torch.from_file(str(tmp_path / "killed.table"), size=300).view(50, 3, 2)[:, 0]
    assert not torch.equal(torn, held)
    assert torch.equal(load_system(tmp_path / "killed").latents.z, held)
    resumed = run("killed")
    assert resumed.wait() == 0
    for file in ("model.safetensors", "state.safetensors"):
        a, b = (read_tensors(tmp_path / name / "step_000040" / file) for name in ("killed", "peaceful"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
