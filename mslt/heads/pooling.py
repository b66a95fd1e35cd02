"""One small head on all hidden states of a frozen encoder: AdapterPooler (BERTVision) and its siblings.

B rows, T tokens, N tokens of all rows that a head reads, D width, L hidden states, A width of the projection, F
features of a token, C labels. Hidden state 0 is the embedding output, hidden state k+1 the output of layer k.

Tokens travel packed, [N, L, D]: those of the first row, then those of the next; a mask [B, T] says where they stand.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy, linear, mse_loss
from transformers import PreTrainedModel

from mslt.data import keyed
from mslt.errors import MsltError
from mslt.files import canonical_json, sha256_file, sha256_text, write_json
from mslt.heads.early_exit import model_hash
from mslt.models import families
from mslt.models.checkpoint import save_state
from mslt.models.layer_stack import iter_hidden
from mslt.provenance import provenance

Pooler = Literal["adapter", "unshared", "mix", "mean", "last"]
Tokens = Literal["flatten", "attention", "first", "each"]
PadStates = Literal["zero", "keep"]
POOLERS: tuple[Pooler, ...] = ("adapter", "unshared", "mix", "mean", "last")
MIX_SPEED = 100.0  # Adam moves a weight by about the rate, 5e-4, a step: too little for a softmax to leave equal shares
HEAD, DESCRIPTION = "head.safetensors", "head.json"


@dataclass(frozen=True)
class HeadSettings:
    """What a head is.

    `kind` joins the hidden states `first_state` to `last_state`, both included: `adapter` projects each by the same
    GELU(W h + b), `unshared` by one of its own, and both lay them side by side; `mix` sums them up with learned weights
    (Tenney et al. 2019, arXiv:1905.05950, equation 1), `mean` with equal ones, `last` takes the last, and then they
    project. With `adapter_width` 0 these three project nothing.

    `tokens` joins a row's tokens: `flatten` side by side, up to `num_tokens`; `attention` weighs them by a learned
    score, so that any length goes; `first` takes [CLS]; `each` answers for every token with its start and end logit
    (SQuAD), `skip` with the last hidden state beside its features. With `pad_states` `zero` padding has features of 0
    and no attention, with `keep` it is read like any token, as the paper's code does."""

    kind: Pooler
    width: int
    first_state: int
    last_state: int
    num_labels: int
    adapter_width: int = 16
    tokens: Tokens = "flatten"
    num_tokens: int = 128
    pad_states: PadStates = "zero"
    skip: bool = False

    @property
    def states(self) -> range:
        """The hidden states that are read."""
        return range(self.last_state if self.kind == "last" else self.first_state, self.last_state + 1)

    @property
    def num_features(self) -> int:
        """F."""
        side_by_side = len(self.states) if self.kind in ("adapter", "unshared") else 1
        return side_by_side * (self.adapter_width or self.width) + self.skip * self.width

    @property
    def is_regression(self) -> bool:
        return self.tokens != "each" and self.num_labels == 1


def states_of_all(every: Sequence[HeadSettings]) -> range:
    """The hidden states that a pass needs for all of these heads."""
    read = [state for settings in every for state in settings.states]
    return range(min(read), max(read) + 1)


def refuse_unfit(settings: HeadSettings, num_layers: int) -> None:
    """MsltError where there is no such head on an encoder of so many layers."""
    if not 0 <= settings.first_state <= settings.last_state <= num_layers:
        raise MsltError(
            f"hidden states {settings.first_state}:{settings.last_state}: this encoder has 0 (embeddings) to "
            f"{num_layers}; give two of them, the lower first, or all"
        )
    if settings.adapter_width < 0 or (settings.kind in ("adapter", "unshared") and not settings.adapter_width):
        raise MsltError(
            f"adapter width {settings.adapter_width}: the pooler {settings.kind} projects to so many values; give 1 "
            "or more" + ("" if settings.kind in ("adapter", "unshared") else ", or 0 to project nothing")
        )
    if settings.tokens == "each" and settings.num_labels != 2:
        raise MsltError(f"{settings.num_labels} labels: an answer's span has 2 ends; give 2")
    if settings.skip and settings.tokens != "each":
        raise MsltError("skip: is of spans alone; leave it out")


def num_parameters(settings: HeadSettings) -> int:
    """What `PoolingHead` of these settings trains, by formula: D·A + A once, or for each state; w and γ of a mix; a
    score; and the output."""
    L, A, F, C = len(settings.states), settings.adapter_width, settings.num_features, settings.num_labels
    projections = (L if settings.kind == "unshared" else 1) * (settings.width * A + A)
    mix = L + 1 if settings.kind == "mix" else 0
    score = F if settings.tokens == "attention" else 0
    inputs = F * settings.num_tokens if settings.tokens == "flatten" else F
    return projections + mix + score + inputs * C + C


class PoolingHead(nn.Module):
    """Weights as torch draws them, by its generator, and the exact GELU."""

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__()
        self.settings = settings
        D, A, F, L = settings.width, settings.adapter_width, settings.num_features, len(settings.states)
        self.projections = nn.ModuleList(
            nn.Linear(D, A) for _ in range((L if settings.kind == "unshared" else 1) if A else 0)
        )
        self.activation = nn.GELU()
        if settings.kind == "mix":
            self.weights_L = nn.Parameter(torch.zeros(L))
            self.gamma = nn.Parameter(torch.ones(()))
        self.score = nn.Linear(F, 1, bias=False) if settings.tokens == "attention" else None
        inputs = F * settings.num_tokens if settings.tokens == "flatten" else F
        self.output = nn.Linear(inputs, settings.num_labels)

    def forward(
        self,
        h_NLD: torch.Tensor,
        mask_BT: torch.Tensor,
        projected_NLA: torch.Tensor | None = None,
        without: int | None = None,
    ) -> torch.Tensor:
        """[B, C], or with `each` [B, T, 2], -inf where the mask has no token. `h_NLD` are `settings.states` of the N
        tokens that `mask_BT` marks, `projected_NLA` what `project_together` made of them; `without` leaves the state of
        this index out. MsltError for rows longer than a head that flattens them reads, and of another length than
        one that reads padding was trained on."""
        settings, T = self.settings, mask_BT.shape[1]
        if settings.pad_states == "keep" and settings.num_tokens != T:
            raise MsltError(f"{T} tokens: this head reads padding, too, and rows of {settings.num_tokens}; pad to that")
        if settings.tokens == "first":
            lengths_B = mask_BT.sum(1)
            h_NLD = h_NLD[lengths_B.cumsum(0) - lengths_B]
            return self.output(self.features(h_NLD, None, without))
        f_BTF = by_row(self.features(h_NLD, projected_NLA, without), mask_BT)
        if settings.tokens == "each":
            return self.output(f_BTF).masked_fill(~mask_BT[:, :, None], -torch.inf)
        if self.score is not None:
            score_BT = self.score(f_BTF)[:, :, 0].masked_fill(~mask_BT, -torch.inf)
            return self.output(torch.bmm(score_BT.softmax(1)[:, None], f_BTF)[:, 0])
        if settings.num_tokens < T:
            raise MsltError(
                f"{T} tokens: this head reads {settings.num_tokens}; cut rows to so many, or train one that pools "
                "tokens by attention"
            )
        seen = T * settings.num_features  # behind it is padding alone, whose features are 0 where it is not kept
        return linear(f_BTF.flatten(1), self.output.weight[:, :seen], self.output.bias)

    def features(
        self, h_NLD: torch.Tensor, projected_NLA: torch.Tensor | None = None, without: int | None = None
    ) -> torch.Tensor:
        """[N, F]."""
        settings = self.settings
        if settings.kind in ("adapter", "unshared"):
            f_NLA = self.project(h_NLD) if projected_NLA is None else projected_NLA
            if without is not None:
                f_NLA = f_NLA.clone()
                f_NLA[:, without] = 0
            f_NF = f_NLA.flatten(1)
        else:
            h_ND = self.combine(h_NLD, without)
            f_NF = self.activation(self.projections[0](h_ND)) if len(self.projections) else h_ND
        if not settings.skip:
            return f_NF
        last_ND = h_NLD[:, -1].to(f_NF.dtype)
        return torch.cat([f_NF, torch.zeros_like(last_ND) if without == len(settings.states) - 1 else last_ND], 1)

    def project(self, h_NLD: torch.Tensor) -> torch.Tensor:
        """[N, L, A]."""
        if self.settings.kind == "adapter":
            return self.activation(self.projections[0](h_NLD))
        each = [self.activation(own(h_NLD[:, index])) for index, own in enumerate(self.projections)]
        return torch.stack(each, 1)

    def combine(self, h_NLD: torch.Tensor, without: int | None = None) -> torch.Tensor:
        """[N, D] of `mix`, `mean`, `last`."""
        if self.settings.kind == "last":
            return h_NLD[:, -1]
        weights_L = self.layer_weights(without)
        h_ND = torch.einsum("l,nld->nd", weights_L.to(h_NLD.dtype), h_NLD)
        return self.gamma * h_ND if self.settings.kind == "mix" else h_ND

    def layer_weights(self, without: int | None = None) -> torch.Tensor:
        """[L] of `mix` and `mean`, with a sum of 1."""
        w_L = MIX_SPEED * self.weights_L if self.settings.kind == "mix" else torch.zeros(len(self.settings.states))
        if without is not None:
            w_L = w_L.index_fill(0, torch.tensor([without], device=w_L.device), -torch.inf)
        return w_L.to(self.output.weight.device).softmax(0)


def by_row(f_NF: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """[B, T, F], 0 where the mask has no token."""
    B, T = mask_BT.shape
    if len(f_NF) == B * T:
        return f_NF.view(B, T, -1)
    places_N = mask_BT.flatten().nonzero()[:, 0]
    return f_NF.new_zeros(B * T, f_NF.shape[1]).index_copy(0, places_N, f_NF).view(B, T, -1)


@torch.no_grad()
def packed_states(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    token_type_ids: torch.Tensor | None,
    read_BT: torch.Tensor,
    states: range,
) -> torch.Tensor:
    """[N, L, D] of the tokens that `read_BT` marks, without a graph; layers above the last of `states` never run. ids,
    mask and types [B, T]."""
    hidden_mask = None if bool(attention_mask.all()) else attention_mask
    places_N = read_BT.flatten().nonzero()[:, 0]
    h_NLD: torch.Tensor | None = None
    for k, h_BTD in iter_hidden(model, input_ids, token_type_ids, hidden_mask):
        if k >= states.start:
            h_ND = h_BTD.flatten(0, 1)
            if h_NLD is None:
                h_NLD = h_ND.new_empty(len(places_N), len(states), h_ND.shape[1])
            h_NLD[:, k - states.start] = h_ND if len(places_N) == len(h_ND) else h_ND.index_select(0, places_N)
        if k == states.stop - 1:
            break
    assert h_NLD is not None
    return h_NLD


def project_together(heads: Sequence[PoolingHead], h_NLD: torch.Tensor) -> list[torch.Tensor]:
    """[N, L, A] of each of these `adapter` heads on the same states, by one product with all their matrices."""
    own = [head.projections[0] for head in heads]
    weights, biases = (torch.cat([getattr(each, name) for each in own]) for name in ("weight", "bias"))
    p_NLA = heads[0].activation(linear(h_NLD, weights, biases))
    return list(p_NLA.split([head.settings.adapter_width for head in heads], -1))


def loss_of(settings: HeadSettings, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A mean over rows: cross entropy of labels [B], the squared error of scores [B], of spans [B, 2] the mean of start
    and end."""
    logits = logits.float()
    if settings.tokens == "each":
        return (cross_entropy(logits[:, :, 0], labels[:, 0]) + cross_entropy(logits[:, :, 1], labels[:, 1])) / 2
    return mse_loss(logits[:, 0], labels) if settings.is_regression else cross_entropy(logits, labels)


def new_head(settings: HeadSettings, model: PreTrainedModel, seed: int) -> PoolingHead:
    """Drawn with the seed, on the model's device. MsltError where it is none for this model."""
    refuse_unfit(settings, model.config.num_hidden_layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed.torch_seed(seed, "pooling_head"))
        return PoolingHead(settings).to(model.device)


@dataclass(frozen=True)
class Sizes:
    """Parameters of the head; of the model under its own head, fully fine-tuned (BERT with its pooler and classifier);
    of what is deployed, that model without layers that never run, and this head, as the paper counts: the pooler and
    the classifier, of BERT-base 592,130, neither run nor need shipping; and bytes (fp32) that a further task stores."""

    head: int
    whole: int
    deployed: int

    @property
    def ratio(self) -> float:
        """How many times smaller the head is: the paper's "209×". The encoder is not counted, and still has to run."""
        return self.whole / self.head

    @property
    def task_bytes(self) -> int:
        return 4 * self.head

    def as_plain(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "task_bytes": self.task_bytes}


def sizes_of(settings: HeadSettings, model: PreTrainedModel) -> Sizes:
    D, C = settings.width, settings.num_labels
    own_head = 2 * D + 2 if settings.tokens == "each" else D * D + D + D * C + C
    whole = sum(p.numel() for p in families.encoder(model).parameters()) + own_head
    never_run = families.layers(model)[settings.last_state :]
    skipped = sum(p.numel() for layer in never_run for p in layer.parameters())
    head = num_parameters(settings)
    return Sizes(head, whole, whole - skipped + head)


# Files

_SAID_BY_CONFIG_ALONE = (
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "position_embedding_type",
    "pad_token_id",
)


def backbone_of(model: PreTrainedModel) -> dict[str, Any]:
    """What a head says of the encoder that it belongs to; the hash is of its weights in fp32, and of what in its config
    changes hidden states."""
    config = {name: getattr(model.config, name, None) for name in _SAID_BY_CONFIG_ALONE}
    weights = model_hash(families.encoder(model), torch.float32)
    return {
        "backbone": str(model.name_or_path),
        "backbone_sha256": sha256_text(canonical_json([weights, config])),
        "model_type": model.config.model_type,
        "num_layers": model.config.num_hidden_layers,
        "width": model.config.hidden_size,
    }


def save_head(folder: Path, head: PoolingHead, backbone: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Write the head and what it belongs to (`backbone_of`) into `folder`; `more` goes into the description, which is
    returned."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).unlink(missing_ok=True)
    state = {name: tensor.detach().cpu() for name, tensor in head.state_dict().items()}
    save_state(folder / HEAD, state, {"settings": canonical_json(asdict(head.settings))})
    described = {
        **backbone, "settings": asdict(head.settings), "head_sha256": sha256_file(folder / HEAD), **more,
        "provenance": provenance(),
    }  # fmt: skip
    write_json(folder / DESCRIPTION, described)  # last: it makes the folder a head's
    return described


def read_description(folder: Path) -> dict[str, Any]:
    """What a folder's head belongs to. MsltError where it holds none."""
    try:
        described = json.loads((folder / DESCRIPTION).read_text())
        _ = described["backbone"], described["backbone_sha256"], described["head_sha256"]
        HeadSettings(**described["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        raise MsltError(f"{folder}: holds no head (no {DESCRIPTION} that can be read); make one with "
                        "`mslt pool train`") from None  # fmt: skip
    return described


def load_head(folder: Path, model: PreTrainedModel, backbone: dict[str, Any] | None = None) -> PoolingHead:
    """The head in `folder`, on the device of the model that it was trained on; `backbone` is `backbone_of(model)` where
    that is known. MsltError for another model, and for a folder without a whole head."""
    described = read_description(folder)
    own = backbone or backbone_of(model)
    for name, what in (("model_type", "kind"), ("num_layers", "layers"), ("width", "width"),
                       ("backbone_sha256", "weights, or config (sha256)")):  # fmt: skip
        theirs, here = described.get(name), own[name]
        if theirs != here:
            if name == "backbone_sha256":
                theirs, here = str(theirs)[:12], here[:12]
            raise MsltError(
                f"{folder}: a head of another encoder: {what} {theirs} there, {here} here; load it onto "
                f"{described['backbone']}, or train one for this"
            )
    try:
        if sha256_file(folder / HEAD) != described["head_sha256"]:
            raise MsltError(f"{folder / HEAD}: is not the file that {DESCRIPTION} speaks of; train the head again")
        with safe_open(folder / HEAD, framework="pt") as file:
            written = (file.metadata() or {}).get("settings")
        if written != canonical_json(described["settings"]):
            raise MsltError(f"{folder / HEAD}: is of other settings than {DESCRIPTION} says; train the head again")
        settings = HeadSettings(**described["settings"])
        refuse_unfit(settings, model.config.num_hidden_layers)
        head = PoolingHead(settings)
        head.load_state_dict(load_file(folder / HEAD))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise MsltError(f"{folder / HEAD}: cannot be read ({error}); train the head again") from None
    return head.to(model.device).eval()
