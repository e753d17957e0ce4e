"""Losses against closed forms, and gathered ones against a joined batch."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from speechbrain import Stage

from microsoft_clap_train import CLAPBrain
from models.losses import contrastive_loss, contrastive_targets, soft_targets
from softclap_train import SoftCLAPBrain


def embeddings(rows, seed, d=6):
    torch.manual_seed(seed)
    return F.normalize(torch.randn(rows, d, dtype=torch.double), dim=1)


def test_one_hot_targets_give_clips_loss():
    audio, text = embeddings(5, 0), embeddings(5, 1)
    ids = torch.arange(5)
    targets = contrastive_targets(ids, ids, ids, ids)
    assert torch.equal(targets, torch.eye(5))
    scale = torch.tensor(10.0)
    loss = contrastive_loss(audio, text, audio, text, scale, targets, targets)
    logits = 10 * audio @ text.T
    expected = -(logits.log_softmax(1) + logits.log_softmax(0)).diag().mean()
    assert loss.item() == pytest.approx(expected.item() / 2, rel=1e-6)


def test_captions_of_a_clip_and_clips_of_a_caption_are_no_negatives():
    clips, captions = torch.tensor([7, 7, 8, 9]), torch.tensor([1, 2, 2, 3])
    targets = contrastive_targets(clips, captions, clips, captions)
    expected = torch.tensor(
        [
            [1 / 2, 1 / 2, 0, 0],
            [1 / 3, 1 / 3, 1 / 3, 0],
            [0, 1 / 2, 1 / 2, 0],
            [0, 0, 0, 1],
        ]
    )
    torch.testing.assert_close(targets, expected)


def test_each_direction_has_its_own_targets():
    audio, text = embeddings(5, 0), embeddings(5, 1)
    own = [torch.softmax(3 * embeddings(5, seed, d=5), 1) for seed in (2, 3)]
    scale = torch.tensor(10.0)
    loss = contrastive_loss(audio, text, audio, text, scale, *own)
    logits = 10 * audio @ text.T
    expected = -sum(
        (targets * x.log_softmax(1)).sum(1).mean() / 2
        for targets, x in zip(own, (logits, logits.T))
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_student_is_validated_with_hard_labels():
    """Without a look at its teacher."""
    ids = torch.tensor([0, 0, 1])
    batch = SimpleNamespace(clip_ids=ids, caption_ids=torch.arange(3))
    brain = SoftCLAPBrain.__new__(SoftCLAPBrain)
    found = SoftCLAPBrain.targets(brain, batch, Stage.VALID, lambda x: x)
    expected = torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]])
    assert all(torch.equal(targets, expected) for targets in found)


def test_identical_embeddings_have_the_uniform_loss():
    same = embeddings(1, 0).expand(4, -1)
    ids = torch.arange(4)
    targets = contrastive_targets(ids, ids, ids, ids)
    scale = torch.tensor(100.0)
    loss = contrastive_loss(same, same, same, same, scale, targets, targets)
    assert loss.item() == pytest.approx(torch.tensor(4.0).log().item())


def test_the_loss_is_in_fp32_also_under_autocast():
    sides = [embeddings(6, seed) for seed in (0, 1, 0, 1)]
    ids, scale = torch.arange(6), torch.tensor(100.0)
    targets = contrastive_targets(ids, ids, ids, ids)
    expected = contrastive_loss(*sides, scale, targets, targets).item()
    sides = [side.float() for side in sides]
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = contrastive_loss(*sides, scale, targets, targets)
        assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_gradients():
    ids = torch.tensor([0, 0, 1])
    targets = contrastive_targets(ids, ids, ids, ids).double()
    audio = embeddings(3, 0).requires_grad_()
    text = embeddings(3, 1).requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.double, requires_grad=True)
    torch.autograd.gradcheck(
        lambda a, t, s: contrastive_loss(a, t, a, t, s, targets, targets),
        (audio, text, scale),
    )


def batch():
    """Eight pairs of inputs; two are of one clip, in different ranks."""
    torch.manual_seed(3)
    return (
        torch.randn(8, 5),
        torch.randn(8, 7),
        torch.tensor([0, 1, 2, 3, 1, 4, 5, 6]),
        torch.arange(8),
    )


def build():
    """Two projections and a scale, in place of the encoders."""
    torch.manual_seed(4)
    return torch.nn.ModuleDict(
        {
            "audio": torch.nn.Linear(5, 4),
            "text": torch.nn.Linear(7, 4),
            "scale": torch.nn.Linear(1, 1),
        }
    )


class Towers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = build()

    def forward(self, audio, text):
        return (
            F.normalize(self.parts["audio"](audio), dim=1),
            F.normalize(self.parts["text"](text), dim=1),
            self.parts["scale"](torch.ones(1)).exp().squeeze(),
        )


def rank_loss(model, rows, kind):
    """That of a Brain, on this process's rows."""
    x, y, clips, captions = (t[rows] for t in batch())
    pairs = SimpleNamespace(
        wavs=x, tokens=y, clip_ids=clips, caption_ids=captions
    )
    brain = kind.__new__(kind)
    brain.hparams = SimpleNamespace(softclap_beta=0.3, softclap_tau=0.1)
    torch.manual_seed(5)
    brain.teacher = Towers()
    for weights in brain.teacher.parameters():
        torch.nn.init.normal_(weights)
    return brain.compute_objectives(model(x, y), pairs, Stage.TRAIN)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def worker(rank, world_size, folder, kind):
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
    )
    model = torch.nn.parallel.DistributedDataParallel(Towers())
    share = 8 // world_size
    loss = rank_loss(model, slice(rank * share, (rank + 1) * share), kind)
    loss.backward()
    torch.distributed.all_reduce(loss.detach())
    if rank == 0:
        result = gradients(model.module), loss.detach() / world_size
        torch.save(result, f"{folder}/result")
    # Gloo may abort a process whose peer leaves while it still takes part, and
    # one whose interpreter winds down.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)


@pytest.mark.parametrize("kind", [CLAPBrain, SoftCLAPBrain])
def test_two_processes_give_the_gradients_of_the_joined_batch(tmp_path, kind):
    mp.spawn(worker, (2, str(tmp_path), kind), nprocs=2)
    found, loss = torch.load(tmp_path / "result")
    model = Towers()
    expected = rank_loss(model, slice(0, 8), kind)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


# ---- Soft targets ----------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 7, 300])
@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize("tau", [1e-4, 0.1, 10])
def test_soft_targets_are_distributions(rows, beta, tau):
    """Also for opposite, equal and zero embeddings."""
    own = embeddings(rows, rows)
    own[: rows // 3] = -own[-1]
    own[rows // 2] = 0
    hard = torch.eye(rows)
    targets = soft_targets(hard, own.float(), own.float(), beta, tau)
    assert (targets >= 0).all()
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(rows))
    loss = contrastive_loss(
        *(own.float(), own.float(), own.float(), own.float()),
        *(torch.tensor(100.0), targets, targets),
    )
    assert torch.isfinite(loss)


def test_soft_targets_at_both_ends():
    own, hard = embeddings(5, 0), torch.eye(5)[[1, 0, 2, 3, 4]]
    assert torch.equal(soft_targets(hard, own, own, 0, 0.1), hard)
    # Towards nothing, the temperature leaves each row its nearest: itself.
    cold = soft_targets(hard, own, own, 1, 1e-3)
    torch.testing.assert_close(cold, torch.eye(5))
    hot = soft_targets(hard, own, own, 1, 1e6)
    torch.testing.assert_close(hot, torch.full((5, 5), 0.2))


def test_soft_targets_in_closed_form():
    own = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    e = torch.tensor(0.4 / 0.2).exp()
    self_share, other_share = e / (e + 1), 1 / (e + 1)
    expected = 0.75 * torch.eye(2) + 0.25 * torch.stack(
        [
            torch.stack([self_share, other_share]),
            torch.stack([other_share, self_share]),
        ]
    )
    targets = soft_targets(torch.eye(2), own, own, 0.25, 0.2)
    torch.testing.assert_close(targets, expected)


def test_captions_of_a_clip_share_its_soft_target():
    """The teacher's part too: it hears the same sound twice."""
    own = embeddings(3, 0)[[0, 0, 1, 2]]
    ids = torch.tensor([0, 0, 1, 2])
    hard = contrastive_targets(ids, torch.arange(4), ids, torch.arange(4))
    targets = soft_targets(hard, own, own, 0.3, 0.1)
    torch.testing.assert_close(targets[0], targets[1])
    torch.testing.assert_close(targets[0, 0], targets[0, 1])


def test_gradients_with_soft_targets():
    own, others = embeddings(3, 2), embeddings(4, 3)
    targets = soft_targets(torch.eye(4)[:3], own, others, 0.3, 0.1).double()
    inputs = [
        embeddings(rows, seed).requires_grad_()
        for seed, rows in enumerate((3, 3, 4, 4))
    ]
    scale = torch.tensor(3.0, dtype=torch.double, requires_grad=True)
    torch.autograd.gradcheck(
        lambda a, t, aa, tt, s: contrastive_loss(
            a, t, aa, tt, s, targets, targets
        ),
        (*inputs, scale),
    )


def test_soft_targets_under_autocast_are_those_without():
    own = embeddings(6, 0).float()
    expected = soft_targets(torch.eye(6), own, own, 0.3, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        low = soft_targets(torch.eye(6), own, own, 0.3, 0.1)
    assert torch.equal(low, expected)
