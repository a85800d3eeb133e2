"""One trajectory, five trainers, five KL terms: the tables and the picture of docs/kl.md.

python docs/five_trainers.py    # needs matplotlib; prints the tables, writes images/five-trainers.png beside itself
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rewardfuse import approx_kl, kl_penalized_rewards, presets

KL_COEF, SCORE = 0.05, 12.0  # the same for all, whatever a trainer's default is
WIDE = {5: -3.0, 12: 12.0, 19: -15.0, 26: -24.0}  # gaps that are no everyday ones, by token
EVERYDAY = 14  # a token to look at beside them
#: Okabe & Ito's palette: told apart with every common colour-vision deficiency.
COLORS = ("#56B4E9", "#000000", "#D55E00", "#E69F00", "#005C43", "#CC79A7")  # in the order of rows()


class Row(NamedTuple):
    """A trainer's KL of each token, by its preset."""

    trainer: str
    place: str  # "reward" or "loss"
    what: str
    kl: Tensor  # [T], nats
    gradient: Tensor  # [T], ∂ kl / ∂ log π
    reward: float  # of the whole response


def trajectory() -> tuple[Tensor, Tensor]:
    """(log π, log π_ref) of the sampled tokens, [1, 32] each, float32: small gaps, and the wide ones."""
    generator = torch.Generator().manual_seed(4)
    ref = -0.1 - 2 * torch.rand(1, 32, generator=generator)
    gaps = 0.35 * torch.randn(1, 32, generator=generator) + 0.1
    for token, gap in WIDE.items():
        gaps[0, token] = gap
    # A log-prob is not above 0: where the gap is positive the reference is the lower one.
    return ref + gaps.clamp(max=0), ref - gaps.clamp(min=0)


def rows() -> list[Row]:
    """The five presets with the trainers' defaults; verl has two, one for the reward and one for the loss."""
    rloo, grpo, openrlhf = presets.trl_rloo(), presets.trl_grpo(), presets.openrlhf()
    verl, nemo_rl = presets.verl(), presets.nemo_rl()
    return [
        _in_reward("TRL RLOO", "k1", rloo),
        _in_reward("verl", "k1", verl),
        _in_reward("OpenRLHF", "k1, clamped to ±10", openrlhf),
        _in_loss("verl", "k3, clamped to ±10", verl),
        _in_loss("NeMo-RL", "w·k3, clamped to ±10", nemo_rl, weighted=True),
        _in_loss("TRL GRPO", "w·k3", grpo),
    ]


def _in_reward(trainer: str, what: str, preset: presets.Preset) -> Row:
    logprobs, ref = trajectory()
    logprobs.requires_grad_()
    shaped = kl_penalized_rewards(logprobs, ref, scores=torch.tensor([SCORE]), kl_coef=KL_COEF, **preset.rewards)
    [gradient] = torch.autograd.grad(shaped.kl.sum(), logprobs)
    return Row(trainer, "reward", what, shaped.kl.detach()[0], gradient[0], shaped.sequence_reward.item())


def _in_loss(trainer: str, what: str, preset: presets.Preset, weighted: bool = False) -> Row:
    logprobs, ref = trajectory()
    logprobs.requires_grad_()
    weight = (logprobs - logprobs.detach()).exp() if weighted else None  # 1, with a gradient
    kl = approx_kl(logprobs, ref, importance_weight=weight, **preset.kl)
    [gradient] = torch.autograd.grad(kl.sum(), logprobs)
    return Row(trainer, "loss", what, kl.detach()[0], gradient[0], SCORE)


def tables() -> tuple[str, str]:
    """Two tables in Markdown: values, with the reward of the response, and gradients."""
    logprobs, ref = trajectory()
    gaps = (logprobs - ref)[0]
    tokens = [EVERYDAY, *WIDE]
    heads = [f"x = {_number(gaps[token].item())}" for token in tokens]
    values = [["trainer", "KL in the", "as", *heads, "all 32 tokens", "reward"]]
    gradients = [["trainer", "KL in the", "as", *heads, "exactly 0 at"]]
    for row in rows():
        names = [row.trainer, row.place, row.what]
        total = row.kl.double().sum().item()
        values.append([*names, *_cells(row.kl[tokens]), _number(total), _number(row.reward)])
        flat = int((row.gradient == 0).sum())
        gradients.append([*names, *_cells(row.gradient[tokens]), f"{flat} tokens" if flat else "none"])
    return _markdown(values), _markdown(gradients)


def _cells(numbers: Tensor) -> list[str]:
    return [_number(number) for number in numbers.tolist()]


def _number(number: float) -> str:
    """Three significant digits, with a true minus sign."""
    text = f"{number:.3g}" if abs(number) < 1e4 else f"{number:.2e}".replace("e+0", "e").replace("e+", "e")
    return text.replace("-", "−")


def _markdown(table: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def draw(path: Path) -> None:
    """Write the picture (PNG)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 11), layout="constrained")
    FigureCanvasAgg(figure)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(1.8, 4, 3))
    _gaps(top)
    _running_sums(middle)
    _gradients(figure, bottom)
    figure.savefig(path, format="png", dpi=110)


def _gaps(axes: Any) -> None:
    logprobs, ref = trajectory()
    gaps = (logprobs - ref)[0]
    colors = ["#000000" if token in WIDE else "#8C8C8C" for token in range(len(gaps))]
    axes.bar(range(len(gaps)), gaps.tolist(), width=0.7, color=colors)
    for token, gap in WIDE.items():
        side = {"xytext": (0, 3), "va": "bottom"} if gap > 0 else {"xytext": (0, -3), "va": "top"}
        axes.annotate(_number(gap), (token, gap), textcoords="offset points", ha="center", **side)
    axes.axhline(0, color="#595959", lw=0.8)
    axes.set(ylabel="x = log π − log π_ref\n[nats]", ylim=(-32, 20))
    axes.set_title("One trajectory: by how much policy and reference differ at each token …", loc="left", fontsize=12)
    _tidy(axes)


def _running_sums(axes: Any) -> None:
    broad, dashed, plain = {"lw": 6, "alpha": 0.6}, {"lw": 1.8, "ls": "--"}, {"lw": 2.2}
    for row, color, style in zip(rows(), COLORS, (broad, dashed, plain) * 2, strict=True):
        sums = row.kl.double().cumsum(0).tolist()
        axes.step(range(len(sums)), sums, where="mid", color=color, label=_label(row), **style)
        if style is not dashed:  # dashed lines lie on the broad ones
            end = (len(sums) - 0.3, sums[-1])
            axes.annotate(_number(end[1]), end, va="center", color=color, fontsize=10.5, annotation_clip=False)
    axes.set_yscale("symlog", linthresh=60, linscale=6)
    ticks = [-40, -20, 0, 20, 40, 60, 1e3, 1e6, 1e9]
    axes.set_yticks(ticks, [*(_number(tick) for tick in ticks[:6]), "10³", "10⁶", "10⁹"])
    axes.minorticks_off()
    axes.axhline(0, color="#595959", lw=0.8)
    axes.set(ylabel="sum of the KL up to a token\n[nats; linear to ±60, then logarithmic]", ylim=(-45, 3e11))
    axes.legend(loc="upper left", fontsize=9.5, frameon=True, framealpha=0.9, edgecolor="none")
    axes.set_title("… the KL that five trainers' default options make of it …", loc="left", fontsize=12)
    _tidy(axes)


def _gradients(figure: Any, axes: Any) -> None:
    from matplotlib.colors import SymLogNorm

    table = torch.stack([row.gradient for row in rows()])
    norm = SymLogNorm(linthresh=0.3, vmin=-30, vmax=30)
    image = axes.imshow(table.numpy(), aspect="auto", cmap="PuOr", norm=norm, interpolation="nearest")
    for row, token in (table == 0).nonzero().tolist():
        axes.text(token, row, "0", ha="center", va="center", fontsize=11, weight="bold")
    axes.set_yticks(range(len(table)), [_label(row).replace(": ", "\n") for row in rows()], fontsize=9)
    axes.set_xticks(range(0, table.shape[1], 2))
    axes.set_xlabel("token position")
    axes.set_title(
        "… and that KL's gradient to each token's log-prob (0: a clamp cuts it off)", loc="left", fontsize=12
    )
    ticks = [-24, -3, -0.3, 0, 0.3, 3, 24]
    bar = figure.colorbar(image, ax=axes, ticks=ticks, pad=0.01)
    bar.ax.set_yticklabels([_number(tick) for tick in ticks])
    bar.ax.minorticks_off()
    bar.set_label("∂KL / ∂log π")


def _label(row: Row) -> str:
    return f"{row.trainer} (in the {row.place}): {row.what}"


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def main() -> None:
    print("\n\n".join(tables()))
    draw(Path(__file__).parent / "images" / "five-trainers.png")


if __name__ == "__main__":
    main()
