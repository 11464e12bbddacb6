"""What of torch the secant and the shares are tried on: operations beyond `cases.OPERATIONS`, and modules of torch.nn."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from cases import FIXED, OPERATIONS, OperationCase
from torch import Tensor, nn

C, I = OperationCase, torch.tensor
HALF = FIXED.abs().sum() * 0 + 0.5


def pair(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: f(*x.chunk(2, 0))


MORE: dict[str, OperationCase] = {
    **{
        f.__name__: C(f)
        for f in (
            torch.sinh,
            torch.cosh,
            torch.asinh,
            torch.atan,
            torch.expm1,
            torch.sinc,
            torch.erfc,
            torch.deg2rad,
            torch.neg,
            torch.positive,
            torch.exp2,
            torch.logit if False else torch.sigmoid,
            F.tanhshrink,
            F.celu,
        )
    },
    **{
        f.__name__: C(f, positive=True)
        for f in (torch.lgamma, torch.digamma, torch.log10, torch.acosh if False else torch.log2)
    },
    **{
        f"{f.__name__} of small numbers": C(lambda x, f=f: f(x * 0.1))
        for f in (torch.tan, torch.asin, torch.acos, torch.atanh, torch.erfinv)
    },
    **{
        f.__name__: C(f, kinks=True)
        for f in (torch.floor, torch.ceil, torch.round, torch.trunc, torch.sign, torch.frac)
    },
    "threshold": C(lambda x: F.threshold(x, 0.1, 0.0), kinks=True),
    "softshrink": C(lambda x: F.softshrink(x, 0.3)),
    "hardshrink": C(lambda x: F.hardshrink(x, 0.3), kinks=True),
    "rrelu": C(lambda x: F.rrelu(x, 0.1, 0.3, training=False)),
    "prelu": C(lambda x: F.prelu(x.T, x[:, 0] * 0 + x[:, 1]), kinks=False),
    "glu": C(lambda x: F.glu(x, 1)),
    "logit": C(lambda x: torch.logit(torch.sigmoid(x))),
    "hypot": C(pair(torch.hypot)),
    "logaddexp": C(pair(torch.logaddexp)),
    "logaddexp2": C(pair(torch.logaddexp2)),
    "xlogy": C(pair(torch.xlogy), positive=True),
    "lerp": C(pair(lambda a, b: torch.lerp(a, b, 0.3))),
    "lerp by a tensor": C(pair(lambda a, b: torch.lerp(a, b, a))),
    "addcmul": C(pair(lambda a, b: torch.addcmul(a, a, b, value=0.3))),
    "addcdiv": C(pair(lambda a, b: torch.addcdiv(a, a, b, value=0.3)), positive=True),
    "true divide by a constant": C(lambda x: x / FIXED.abs().clamp(min=0.1)),
    "constant over": C(lambda x: 2.0 / x, positive=True),
    "reverse minus": C(lambda x: 1 - x),
    "remainder": C(lambda x: torch.remainder(x, 0.7), kinks=True),
    "fmod": C(lambda x: torch.fmod(x, 0.7), kinks=True),
    "fmax": C(pair(torch.fmax)),
    "fmin": C(pair(torch.fmin)),
    "copysign": C(pair(torch.copysign)),
    "outer": C(lambda x: torch.outer(x[0], x[1])),
    "inner": C(lambda x: torch.inner(x, x)),
    "kron": C(lambda x: torch.kron(x[:2, :2], x[2:, 2:4])),
    "dot": C(lambda x: torch.dot(x[0], x[1])),
    "matrix times vector": C(lambda x: x @ x[0]),
    "addmv": C(lambda x: torch.addmv(x[:, 0], x, x[1])),
    "baddbmm": C(lambda x: torch.baddbmm(x[:, :, :3], x, x.transpose(1, 2)), (2, 3, 4)),
    "addbmm": C(lambda x: torch.addbmm(x[0, :, :3], x, x.transpose(1, 2)), (2, 3, 4)),
    "chained products": C(lambda x: torch.chain_matmul(x, x.T, x) if False else x @ x.T @ x),
    "tensordot": C(lambda x: torch.tensordot(x, x, dims=([1], [1]))),
    "cross": C(lambda x: torch.linalg.cross(x[:, :3], x[:, 3:])),
    "bilinear": C(lambda x: F.bilinear(x[:, :2], x[:, 2:4], x[:, :4].reshape(4, 2, 2))),
    "linear": C(lambda x: F.linear(x, x, x[:, 0])),
    "determinant": C(lambda x: torch.linalg.det(x[:, :4] + 3 * torch.eye(4, dtype=x.dtype))),
    "inverse": C(lambda x: torch.linalg.inv(x[:, :4] + 4 * torch.eye(4, dtype=x.dtype))),
    "solve": C(lambda x: torch.linalg.solve(x[:, :4] + 4 * torch.eye(4, dtype=x.dtype), x[:, 4:])),
    "cholesky": C(lambda x: torch.linalg.cholesky(x @ x.T + torch.eye(4, dtype=x.dtype))),
    "matrix exponential": C(lambda x: torch.linalg.matrix_exp(x[:, :4] * 0.1)),
    "matrix power": C(lambda x: torch.linalg.matrix_power(x[:, :4], 3)),
    "trace": C(lambda x: torch.trace(x[:, :4])),
    "vector norm of order three": C(lambda x: torch.linalg.vector_norm(x, 3, dim=1)),
    "vector norm of order one": C(lambda x: torch.linalg.vector_norm(x, 1, dim=1)),
    "largest entry as a norm": C(lambda x: torch.linalg.vector_norm(x, torch.inf, dim=1)),
    "Frobenius norm": C(lambda x: torch.linalg.matrix_norm(x)),
    "normalize": C(lambda x: F.normalize(x, dim=1)),
    "pairwise distance": C(pair(F.pairwise_distance)),
    "all distances": C(lambda x: torch.cdist(x, x[:2] + 1.0)),
    "renormed": C(lambda x: x / x.norm(dim=0, keepdim=True)),
    "mean": C(lambda x: x.mean(0, keepdim=True)),
    "sum over two": C(lambda x: x.sum((0, 1))),
    "product": C(torch.prod),
    "running product": C(lambda x: x.cumprod(1)),
    "running logsumexp": C(lambda x: x.logcumsumexp(1)),
    "running maximum": C(lambda x: x.cummax(1).values, kinks=True),
    "median": C(lambda x: x.median(1).values, kinks=True),
    "k-th smallest": C(lambda x: x.kthvalue(2, 1).values, kinks=True),
    "quantile": C(lambda x: torch.quantile(x, 0.3, dim=1), kinks=True),
    "argmax as an index": C(lambda x: x[torch.arange(4), x.argmax(1)], kinks=True),
    "differences": C(lambda x: torch.diff(x, dim=1)),
    "trapezoid": C(lambda x: torch.trapezoid(x, dim=1)),
    "covariance": C(torch.cov),
    "correlation": C(torch.corrcoef),
    "variance and mean": C(lambda x: torch.cat(torch.var_mean(x, 1))),
    "softmin": C(lambda x: F.softmin(x, 1)),
    "straight through": C(lambda x: (x.round() - x).detach() + x, kinks=True),
    "mse": C(pair(F.mse_loss)),
    "l1": C(pair(F.l1_loss)),
    "smooth l1": C(pair(F.smooth_l1_loss)),
    "huber": C(pair(F.huber_loss)),
    "bce with logits": C(lambda x: F.binary_cross_entropy_with_logits(x, FIXED.abs())),
    "bce": C(lambda x: F.binary_cross_entropy(torch.sigmoid(x), FIXED.abs())),
    "KL divergence": C(
        pair(lambda a, b: F.kl_div(a.log_softmax(1), b.log_softmax(1), log_target=True, reduction="batchmean"))
    ),
    "NLL of images": C(lambda x: F.nll_loss(x.reshape(1, 4, 6).log_softmax(1), I([[0, 1, 2, 3, 0, 1]]))),
    "Poisson NLL": C(lambda x: F.poisson_nll_loss(x, FIXED.abs())),
    "Gaussian NLL": C(pair(lambda a, b: F.gaussian_nll_loss(a, b * 0 + 0.3, b.exp()))),
    "hinge embedding": C(lambda x: F.hinge_embedding_loss(x, torch.where(FIXED > 0, 1.0, -1.0))),
    "margin ranking": C(lambda x: F.margin_ranking_loss(x[0], x[1], torch.ones(6, dtype=x.dtype))),
    "multi-margin": C(lambda x: F.multi_margin_loss(x, I([0, 1, 2, 3]))),
    "soft margin": C(lambda x: F.soft_margin_loss(x, torch.where(FIXED > 0, 1.0, -1.0))),
    "cosine embedding": C(pair(lambda a, b: F.cosine_embedding_loss(a, b, torch.ones(2, dtype=a.dtype)))),
    "triplet": C(lambda x: F.triplet_margin_loss(x[:1], x[1:2], x[2:3])),
    "smoothed cross entropy": C(lambda x: F.cross_entropy(x, I([0, 1, 5, 3]), label_smoothing=0.1, ignore_index=5)),
    "weighted cross entropy": C(lambda x: F.cross_entropy(x, I([0, 1, 5, 3]), weight=FIXED[0].abs())),
    "cross entropy of probabilities": C(lambda x: F.cross_entropy(x, FIXED.softmax(1))),
    "convolution 3d": C(lambda x: F.conv3d(x, x[:, :, :2, :2, :2]), (2, 2, 3, 3, 3)),
    "strided, dilated convolution": C(lambda x: F.conv2d(x, x[..., :2, :2], stride=2, dilation=2), (2, 2, 5, 5)),
    "grouped convolution": C(lambda x: F.conv1d(x, x[:, :1, :3], groups=2), (2, 2, 5)),
    "transposed convolution 1d": C(lambda x: F.conv_transpose1d(x, x[:, :, :3], stride=2), (2, 2, 5)),
    "transposed convolution 2d": C(lambda x: F.conv_transpose2d(x, x[..., :2, :2]), (2, 2, 3, 4)),
    "unfold": C(lambda x: F.unfold(x, 2), (1, 2, 4, 4)),
    "fold": C(lambda x: F.fold(x, (3, 3), 2), (1, 4, 4)),
    "average pool 1d": C(lambda x: F.avg_pool1d(x, 2), (2, 2, 6)),
    "average pool 3d": C(lambda x: F.avg_pool3d(x, 2), (1, 1, 4, 4, 4)),
    "padded average pool": C(lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), (1, 2, 4, 4)),
    "power average pool": C(lambda x: F.lp_pool2d(x.abs() + 0.1, 2, 2), (1, 2, 4, 4)),
    "adaptive average pool 1d": C(lambda x: F.adaptive_avg_pool1d(x, 3), (1, 2, 7)),
    "adaptive max pool": C(lambda x: F.adaptive_max_pool2d(x, 2), (1, 2, 4, 6)),
    "max pool 3d": C(lambda x: F.max_pool3d(x, 2), (1, 1, 4, 4, 4)),
    "nearest upsampling": C(lambda x: F.interpolate(x, scale_factor=2), (1, 2, 3, 3)),
    "bilinear upsampling": C(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), (1, 2, 3, 3)),
    "linear upsampling": C(lambda x: F.interpolate(x, 7, mode="linear", align_corners=True), (1, 2, 4)),
    "bicubic upsampling": C(lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), (1, 1, 4, 4)),
    "pixel shuffle": C(lambda x: F.pixel_shuffle(x, 2), (1, 4, 2, 3)),
    "pixel unshuffle": C(lambda x: F.pixel_unshuffle(x, 2), (1, 1, 4, 4)),
    "channel shuffle": C(lambda x: F.channel_shuffle(x, 2), (1, 4, 2, 2)),
    "grid sample": C(
        lambda x: F.grid_sample(x, x[:, :1, :2, :2].expand(1, 2, 2, 2).permute(0, 2, 3, 1) * 0.2, align_corners=False),
        (1, 2, 3, 3),
    ),
    "affine grid": C(lambda x: F.affine_grid(x[:, :, :3], (1, 1, 2, 2), align_corners=False), (1, 2, 3)),
    "reflection padding": C(lambda x: F.pad(x, (1, 2), mode="reflect"), (1, 2, 5)),
    "replication padding": C(lambda x: F.pad(x, (1, 2), mode="replicate"), (1, 2, 5)),
    "circular padding": C(lambda x: F.pad(x, (1, 2), mode="circular"), (1, 2, 5)),
    "local response norm": C(lambda x: F.local_response_norm(x, 2), (1, 4, 3)),
    "instance norm": C(lambda x: F.instance_norm(x), (2, 3, 4)),
    "batch norm of a batch": C(lambda x: F.batch_norm(x, None, None, x[0], x[1], training=True)),
    "embedding bag, sums": C(lambda x: F.embedding_bag(I([[0, 2], [2, 3]]), x, mode="sum")),
    "embedding bag, means": C(lambda x: F.embedding_bag(I([[0, 2], [2, 3]]), x)),
    "embedding bag, maxima": C(lambda x: F.embedding_bag(I([[0, 2], [2, 3]]), x, mode="max")),
    "embedding bag, weighted": C(
        lambda x: F.embedding_bag(I([[0, 2], [2, 3]]), x, mode="sum", per_sample_weights=x[:2, :2])
    ),
    "embedding bag with offsets": C(lambda x: F.embedding_bag(I([0, 2, 2, 3]), x, I([0, 1, 1]))),
    "embedding bag with padding": C(lambda x: F.embedding_bag(I([[0, 2], [2, 3]]), x, padding_idx=2)),
    "causal attention": C(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), (1, 2, 3, 4)),
    "masked attention": C(
        lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(3, 3).tril().bool()), (2, 3, 4)
    ),
    "GRU cell": C(lambda x: torch.gru_cell(x[:1, :3], x[1:2, :1], x[:3, :3], x[:3, 3:4]), (4, 6)),
    "LSTM cell": C(lambda x: torch.lstm_cell(x[:1, :3], (x[:1, :1], x[:1, 1:2]), x[:, :3], x[:, 3:4])[0], (4, 6)),
    "index add": C(lambda x: torch.zeros(3, 6, dtype=x.dtype).index_add(0, I([0, 2, 2, 1]), x)),
    "index copy": C(lambda x: torch.zeros(5, 6, dtype=x.dtype).index_copy(0, I([0, 2, 4, 1]), x)),
    "index fill": C(lambda x: x.index_fill(0, I([1]), 0.5)),
    "scatter": C(lambda x: torch.zeros(4, 8, dtype=x.dtype).scatter(1, I([[0, 2, 4, 6, 1, 3]] * 4), x)),
    "scatter add": C(lambda x: torch.zeros(4, 8, dtype=x.dtype).scatter_add(1, I([[0, 2, 4, 6, 1, 1]] * 4), x)),
    "scatter reduce": C(
        lambda x: torch.zeros(4, 3, dtype=x.dtype).scatter_reduce(
            1, I([[0, 0, 1, 1, 2, 2]] * 4), x, "amax", include_self=False
        ),
        kinks=True,
    ),
    "masked scatter": C(lambda x: torch.zeros(4, 6, dtype=x.dtype).masked_scatter(FIXED > 0, x)),
    "masked select": C(lambda x: x.masked_select(FIXED > 0)),
    "take": C(lambda x: x.take(I([0, 5, 7]))),
    "take along": C(lambda x: x.take_along_dim(I([[0, 5], [1, 2], [3, 3], [0, 1]]), 1)),
    "rotations": C(lambda x: torch.rot90(x, 1, (0, 1))),
    "repeats": C(lambda x: x.repeat(2, 1).repeat_interleave(2, 1)),
    "tiles": C(lambda x: torch.tile(x, (2, 2))),
    "movements": C(lambda x: x.movedim(0, 1).swapaxes(0, 1).narrow(1, 1, 3).squeeze()),
    "diagonals": C(lambda x: torch.diag_embed(x).diagonal(1, 1, 2)),
    "triangles": C(lambda x: x.tril(1) + x.triu(-1)),
    "block diagonal": C(lambda x: torch.block_diag(x[:2], x[2:])),
    "combinations": C(lambda x: torch.cartesian_prod(x[0], x[1])),
    "meshgrid": C(lambda x: torch.stack(torch.meshgrid(x[0], x[1], indexing="ij"))),
    "stacks": C(lambda x: torch.hstack([torch.vstack([x, x]), torch.dstack([x, x]).flatten(0, 1)[:8, :1]])),
    "strides": C(lambda x: x.as_strided((2, 3), (6, 2))),
    "round trip through integers": C(lambda x: x * x.long().double(), kinks=True),
    "heaviside": C(lambda x: x * torch.heaviside(x, x * 0), kinks=True),
    "one-hot of the largest": C(lambda x: (x * F.one_hot(x.argmax(1), 6)).sum(1)),
    "nan to num": C(lambda x: torch.nan_to_num(x)),
    "polar angle": C(pair(torch.atan2)),
    "bucketed": C(lambda x: x * torch.bucketize(x, FIXED[0].sort().values).double(), kinks=True),
    "gaussian mixture": C(lambda x: torch.logsumexp(-((x[:, None] - x[None]) ** 2).sum(-1), 1)),
}


# as the models of transformers have them
def _rotated(x: Tensor) -> Tensor:
    angles = torch.outer(torch.arange(4), I([1.0, 0.1, 0.01])).repeat(1, 2)
    half = torch.cat([-x[..., 3:], x[..., :3]], -1)
    return x * angles.cos().to(x.dtype) + half * angles.sin().to(x.dtype)


def _masked(x: Tensor) -> Tensor:
    """Scores under a mask of the lowest number there is."""
    mask = torch.ones(4, 6, dtype=torch.bool).tril()
    return torch.softmax(x + torch.zeros_like(x).masked_fill(~mask, torch.finfo(x.dtype).min), -1)


def _repeated(x: Tensor) -> Tensor:
    """Each head of keys for two heads of queries."""
    return x[:, :, None].expand(1, 2, 2, 3, 4).reshape(1, 4, 3, 4)


MORE |= {
    "rotary positions": C(_rotated),
    "softmax under the lowest number": C(_masked),
    "gelu of GPT-2": C(
        lambda x: 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))
    ),
    "RMS norm written out": C(lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    "shared keys": C(
        lambda x: F.scaled_dot_product_attention(x.repeat(1, 2, 1, 1), _repeated(x), _repeated(x), is_causal=True),
        (1, 2, 3, 4),
    ),
    "attention under an additive mask": C(
        lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=x.new_full((3, 3), -torch.inf).triu(1)),
        (1, 2, 3, 4),
    ),
    "patches": C(lambda x: F.conv2d(x, x[:, :, :2, :2], stride=2).flatten(2).transpose(1, 2), (2, 2, 4, 4)),
}
ALL = {**OPERATIONS, **MORE}

# operations that the secant refuses, by what its message names
REFUSED: dict[str, str] = dict.fromkeys(("Gaussian NLL", "one-hot of the largest"), "data-dependent control flow")

# functions that cancel by themselves: their values are that many times less precise
CANCELS = {"log of a sigmoid near one": 1e5}


class ModuleCase(NamedTuple):
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    pick: Callable[[Tensor], Tensor] = lambda y: y


def first(y: tuple[Tensor, ...]) -> Tensor:
    return y[0]


M = ModuleCase


class Itself(nn.Module):
    """A module of several inputs, given the same one for each, or the last one flipped."""

    def __init__(self, module: nn.Module, times: int, flipped: bool = False) -> None:
        super().__init__()
        self.module, self.times, self.flipped = module, times, flipped

    def forward(self, x: Tensor) -> Tensor:
        last = x.flip(-1) if self.flipped else x
        return self.module(*[x] * (self.times - 1), last)


class Ids(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module((x.detach().abs() * 3).long() % 5)


MODULES: dict[str, ModuleCase] = {
    "Linear": M(lambda: nn.Linear(4, 3), (4,)),
    "Bilinear": M(lambda: Itself(nn.Bilinear(4, 4, 3), 2), (4,)),
    "Conv1d": M(lambda: nn.Conv1d(2, 3, 3, padding="same", padding_mode="circular"), (2, 5)),
    "Conv2d": M(lambda: nn.Conv2d(2, 4, 2, groups=2, stride=2), (2, 4, 4)),
    "Conv3d": M(lambda: nn.Conv3d(2, 2, 2), (2, 3, 3, 3)),
    "ConvTranspose1d": M(lambda: nn.ConvTranspose1d(2, 3, 2, stride=2), (2, 3)),
    "ConvTranspose2d": M(lambda: nn.ConvTranspose2d(2, 2, 2), (2, 3, 3)),
    "ConvTranspose3d": M(lambda: nn.ConvTranspose3d(1, 2, 2), (1, 2, 2, 2)),
    "LazyLinear": M(lambda: _met(nn.LazyLinear(3), 4), (4,)),
    "Embedding": M(lambda: Ids(nn.Embedding(5, 3)), (2,)),
    "EmbeddingBag": M(lambda: Ids(nn.EmbeddingBag(5, 3)), (3,)),
    "EmbeddingBag sum": M(lambda: Ids(nn.EmbeddingBag(5, 3, mode="sum")), (3,)),
    "LayerNorm": M(lambda: nn.LayerNorm(4), (3, 4)),
    "RMSNorm": M(lambda: nn.RMSNorm(4), (3, 4)),
    "GroupNorm": M(lambda: nn.GroupNorm(2, 4), (4, 3)),
    "InstanceNorm1d": M(lambda: nn.InstanceNorm1d(2, affine=True), (2, 4)),
    "InstanceNorm2d": M(lambda: nn.InstanceNorm2d(2, affine=True), (2, 3, 3)),
    "BatchNorm1d": M(lambda: nn.BatchNorm1d(4, track_running_stats=False), (4,)),
    "BatchNorm2d": M(lambda: nn.BatchNorm2d(2, track_running_stats=False), (2, 3, 3)),
    "BatchNorm1d eval": M(lambda: nn.BatchNorm1d(4).eval(), (4,)),
    "LocalResponseNorm": M(lambda: nn.LocalResponseNorm(2), (4, 3)),
    "PReLU": M(lambda: nn.PReLU(4), (4,)),
    "PReLU of one": M(lambda: nn.PReLU(), (4, 2)),
    "RReLU eval": M(lambda: nn.RReLU().eval(), (4,)),
    "GLU": M(lambda: nn.GLU(1), (4,)),
    **{k.__name__: M(k, (4,)) for k in (nn.ReLU, nn.ReLU6, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid,
                                       nn.Tanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Hardswish, nn.Hardtanh,
                                       nn.Hardsigmoid, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.LeakyReLU)},
    "Softmax": M(lambda: nn.Softmax(1), (4,)),
    "LogSoftmax": M(lambda: nn.LogSoftmax(1), (4,)),
    "Softmin": M(lambda: nn.Softmin(1), (4,)),
    "Threshold": M(lambda: nn.Threshold(0.1, 0.0), (4,)),
    "MaxPool1d": M(lambda: nn.MaxPool1d(2), (2, 4)),
    "MaxPool2d": M(lambda: nn.MaxPool2d(2), (1, 4, 4)),
    "AvgPool2d": M(lambda: nn.AvgPool2d(2), (1, 4, 4)),
    "AdaptiveAvgPool2d": M(lambda: nn.AdaptiveAvgPool2d(2), (1, 5, 4)),
    "AdaptiveMaxPool1d": M(lambda: nn.AdaptiveMaxPool1d(2), (2, 5)),
    "LPPool1d": M(lambda: nn.Sequential(nn.Sigmoid(), nn.LPPool1d(2, 2)), (2, 4)),
    "CosineSimilarity": M(lambda: Itself(nn.CosineSimilarity(1), 2, flipped=True), (4,)),
    "MultiheadAttention": M(lambda: Itself(nn.MultiheadAttention(4, 2, batch_first=True), 3), (3, 4), first),
    "MultiheadAttention with biases": M(
        lambda: Itself(nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True), 3), (3, 4), first
    ),
    "TransformerEncoderLayer": M(lambda: nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True), (3, 4)),
    "TransformerEncoderLayer, norm first": M(
        lambda: nn.TransformerEncoderLayer(4, 2, 6, 0.0, "gelu", batch_first=True, norm_first=True), (3, 4)
    ),
    "TransformerDecoderLayer": M(lambda: Itself(nn.TransformerDecoderLayer(4, 2, 6, 0.0, batch_first=True), 2), (3, 4)),
    "RNN": M(lambda: nn.RNN(4, 3, batch_first=True), (3, 4), first),
    "LSTM": M(lambda: nn.LSTM(4, 3, batch_first=True), (3, 4), first),
    "LSTM, both ways": M(lambda: nn.LSTM(4, 3, 2, bidirectional=True, batch_first=True), (3, 4), first),
    "GRU": M(lambda: nn.GRU(4, 3), (3, 4), first),
    "LSTMCell": M(lambda: nn.LSTMCell(4, 3), (4,), first),
    "GRUCell": M(lambda: nn.GRUCell(4, 3), (4,)),
    "RNNCell": M(lambda: nn.RNNCell(4, 3), (4,)),
    "weight norm": M(lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 2)), (2, 4)),
    "orthogonal": M(lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), (4,)),
    "spectral norm": M(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)).eval(), (4,)),
}  # fmt: skip


def _met(lazy: nn.Module, width: int) -> nn.Module:
    lazy(torch.zeros(1, width))
    return lazy


UNTRACEABLE: dict[str, str] = {}  # modules that the secant refuses, by what its message names
