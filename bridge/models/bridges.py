"""Bridges, and the coupled models: a dense model, a sparse model and a bridge at every site (Gao et al. 2025, section 2.3).

    f_i(h) = AbsTopK(W_f (h - mu_i) / sigma_i + b_f)          encoder, dense residual -> sparse residual
    g_i(x) = (W_g x + b_g) sigma_i + mu_i                     decoder, sparse residual -> dense residual

mu_i and sigma_i are the mean and the scale of the dense residual at site i over a first batch. They are constants, so both maps
stay affine. With them one learning rate serves sites whose residuals differ in size by orders of magnitude.

Hybrid passes are runs in which one model's residual enters the other: `dense_to_sparse` and `sparse_to_dense`.

A coupling is saved as a folder: `coupling.json` (the recipe, and which dense model) and a safetensors file that stores sparse
weights by their nonzeros. The dense model is not stored: it is found by its path relative to the folder, otherwise by its name,
and is refused unless its weights and configuration are those that were coupled.

Shape legend: b batch row, t token, d dense width, s sparse width, v vocabulary.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridge.huggingface.identity import Identity
from bridge.kernels.products import weight_version
from bridge.kernels.top_k import abs_top_k
from bridge.models.dense import DenseModel, DenseModelError, load_dense
from bridge.models.residual import Enter
from bridge.models.span import DenseSpan, SparseSpan, dense_of
from bridge.models.sparse import SparseTransformer
from bridge.models.store import CheckpointError, pack_nonzeros, read_folder, refuse_unreadable, unpack_nonzeros, write_folder
from bridge.recipe import Recipe, resolve

FORMAT = 2
T = TypeVar("T")


class Bridge(nn.Module):
    """The pair of maps at one site: encoder and decoder."""

    mean_d: Tensor
    scale: Tensor

    def __init__(self, dense_width: int, sparse_width: int, keep: float, *, seed: int = 0) -> None:
        super().__init__()
        self.keep = keep
        self.encoder = nn.Linear(dense_width, sparse_width)
        self.decoder = nn.Linear(sparse_width, dense_width)
        self.register_buffer("mean_d", torch.zeros(dense_width))
        self.register_buffer("scale", torch.ones(()))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():  # decoder = transpose of an orthonormal encoder, so that decoding undoes encoding
            long, short = max(dense_width, sparse_width), min(dense_width, sparse_width)
            frame = torch.linalg.qr(torch.randn(long, short, generator=generator)).Q
            self.encoder.weight.copy_(frame if sparse_width >= dense_width else frame.T)
            self.decoder.weight.copy_(self.encoder.weight.T)
            self.encoder.bias.zero_()
            self.decoder.bias.zero_()

    def encode(self, h_btd: Tensor) -> Tensor:
        """Return f_i(h): x_bts of a dense residual."""
        scaled_btd = (h_btd - self.mean_d) / self.scale
        x_bts = self.encoder(scaled_btd)
        return abs_top_k(x_bts, max(1, round(self.keep * x_bts.shape[-1]))).to(scaled_btd.dtype)

    def decode(self, x_bts: Tensor) -> Tensor:
        """Return g_i(x): h_btd of a sparse residual."""
        return self.decoder(x_bts).to(self.scale.dtype) * self.scale + self.mean_d

    def decode_change(self, change_bts: Tensor) -> Tensor:
        """Return the change of g_i(x) for a change of x, by the linear part of the decoder."""
        return F.linear(change_bts, self.decoder.weight) * self.scale


class Bridges(nn.Module):
    """A bridge at every site."""

    def __init__(self, n_sites: int, dense_width: int, sparse_width: int, keep: float, *, seed: int = 0) -> None:
        super().__init__()
        # one seed for all sites, so that they start with one sparse basis, as the residual stream has one
        self.at_site = nn.ModuleList(Bridge(dense_width, sparse_width, keep, seed=seed) for _ in range(n_sites))

    def __getitem__(self, site: int) -> Bridge:
        bridge = self.at_site[site]
        assert isinstance(bridge, Bridge)
        return bridge

    def __len__(self) -> int:
        return len(self.at_site)

    @torch.no_grad()
    def calibrate(self, residuals: Sequence[Tensor]) -> None:
        """Set mu and sigma of every site from dense residuals h_btd, without the first position, which has outliers."""
        for site, h_btd in enumerate(residuals):
            later_btd = h_btd[:, 1:].float() if h_btd.shape[1] > 1 else h_btd.float()
            mean_d = later_btd.mean((0, 1))
            self[site].mean_d.copy_(mean_d)
            self[site].scale.copy_((later_btd - mean_d).square().mean().sqrt().clamp_min(1e-6))


@dataclass(frozen=True)
class CoupledModels:
    """A dense model, the sparse model that explains it, the bridges between them, and the recipe they were fitted by.

    reference_bt holds some blocks of held-out text, the corpus over which means are taken when a prompt is explained; path is
    the folder or hub id that the coupling was loaded from.
    """

    dense: DenseModel
    sparse: SparseTransformer
    bridges: Bridges
    recipe: Recipe
    reference_bt: Tensor | None = None
    path: str | None = None
    _cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.dense.n_sites == self.sparse.n_sites == len(self.bridges):
            raise ValueError(
                f"the dense model has {self.dense.n_sites} sites, the sparse model {self.sparse.n_sites}, and there are "
                f"{len(self.bridges)} bridges; a coupling needs one bridge at each of the same sites"
            )
        if self.dense.vocabulary != self.sparse.vocabulary:
            raise ValueError(
                f"the dense model has {self.dense.vocabulary} logits, the sparse model {self.sparse.vocabulary}; they must agree"
            )
        if isinstance(self.sparse, SparseSpan):
            if not isinstance(self.dense, DenseSpan):
                raise ValueError(
                    "the sparse model belongs to a span, but the dense model is a whole model; give the span (`dense_of`)"
                )
            first, last = self.bridges[0], self.bridges[self.n_sites - 1]
            object.__setattr__(self, "sparse", self.sparse.attach_ends(self.dense, first.encode, last.decode))

    @property
    def n_sites(self) -> int:
        """Number of sites, the same in both models."""
        return self.dense.n_sites

    @property
    def blocks(self) -> str | None:
        """The dense model's blocks that are coupled, as first:last; None if the whole model is coupled."""
        return self.dense.slice if isinstance(self.dense, DenseSpan) else None

    @property
    def ends(self) -> tuple[tuple[int, str], ...]:
        """(site, name) of the maps with which a span's sparse model itself begins and ends: first encoder, last decoder."""
        return ((0, "encoder"), (self.n_sites - 1, "decoder")) if self.blocks else ()

    @property
    def context(self) -> int:
        """Largest number of tokens that a prompt may have."""
        return self.sparse.context

    @property
    def provenance(self) -> dict[str, Any]:
        """Origin of a stored result: both models, and the version of bridge that made it."""
        return {
            "dense": self.dense.name,
            "dense_fingerprint": self.dense.fingerprint(),
            "coupling": self.path,
            "l0": self.recipe.sparsity.l0,
            "blocks": self.blocks,
            "version": version("bridge"),
        }

    def once(self, what: str, tokens_bt: Tensor, compute: Callable[[], T]) -> T:
        """Return compute() on some text, cached while weights and text stay the same; one value is cached for each `what`."""
        weights = [*self.dense.model.parameters(), *self.sparse.parameters()]
        text = hashlib.sha256(tokens_bt.detach().cpu().long().numpy().tobytes()).digest()
        state = (text, tokens_bt.shape, *(weight_version(weight) for weight in weights))
        if what not in self._cache or self._cache[what][0] != state:
            self._cache[what] = (state, compute())
        return self._cache[what][1]

    def dense_to_sparse(self, tokens_bt: Tensor, dense_residuals: Sequence[Tensor], site: int) -> Tensor:
        """Return logits_btv of the hybrid that is dense up to `site` (its residuals given), encoded there, sparse to the end."""
        return self.sparse.run(tokens_bt, Enter.at(site, self.bridges[site].encode(dense_residuals[site]))).logits_btv

    def sparse_to_dense(self, tokens_bt: Tensor, sparse_residuals: Sequence[Tensor], site: int) -> Tensor:
        """Return logits_btv of the hybrid that is sparse up to `site` (its residuals given), decoded there, dense to the end."""
        return self.dense.run(tokens_bt, Enter.at(site, self.bridges[site].decode(sparse_residuals[site]))).logits_btv

    def save_pretrained(self, path: str | Path) -> None:
        """Write the coupling to a folder, with a model card. Raises CheckpointError if that fails; no file is half-written."""
        self._write(Path(path), Path(path).resolve().name, self._dense(path))

    def _write(self, path: Path, title: str, dense: dict[str, Any]) -> None:
        packed = self.sparse.sparse_weights()
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.sparse.named_parameters():
            key = f"sparse.{name}"
            tensors |= pack_nonzeros(key, parameter) if name in packed else {key: parameter}
        tensors |= {f"bridges.{name}": tensor for name, tensor in self.bridges.state_dict().items()}
        if self.reference_bt is not None:
            tensors["reference_bt"] = self.reference_bt.to(torch.int32)
        facts = {"format": FORMAT, "recipe": self.recipe.model_dump(), "dense": dense}
        write_folder(path, "coupling", tensors, facts, {"README.md": self._card(title)})

    @staticmethod
    def from_pretrained(
        path: str | Path, *, dense: Any = None, tokenizer: Any = None, device: str = "cpu", fine_tuned: bool = False
    ) -> CoupledModels:
        """Load a coupling from a folder or a hub id, and its dense model (or take `dense`: a name, a live model, a DenseModel).

        `dense` may be anywhere, but must be the same model; with `fine_tuned`, a model of the same shape, to which the bridges
        are not fitted. Raises CheckpointError if files are missing or damaged, or if the dense model is not the one that was
        coupled; the error says how it differs.
        """
        folder = local_folder(path)
        tensors, facts = read_folder(folder, "coupling")
        if facts.get("format") != FORMAT:
            found = facts.get("format")
            raise CheckpointError(
                f"{str(folder)!r}", f"has format {found!r}, but this version of bridge reads {FORMAT}", "fit it again"
            )
        with refuse_unreadable(f"{str(folder)!r}", "coupling", "fit it again"):
            recipe, known = resolve(facts["recipe"]), facts["dense"]
            sparse = new_sparse_model(recipe, tuple(known["sublayers"]), known["vocabulary"])
            bridges = Bridges(sparse.n_sites, known["width"], sparse.width, sparse.keep)
            identity, fitted_to = Identity.read(known), known["name"]
            texts = (fitted_to, known.get("beside") or "", known.get("adapter_beside") or "")
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("the name or path of its dense model is not a text")
        _check_numbers(folder, tensors, sparse.vocabulary)
        if not isinstance(dense, DenseModel):
            named = dense is None or isinstance(dense, (str, Path))
            try:
                dense = load_dense(
                    _locate(folder, fitted_to, known.get("beside")) if dense is None else dense,
                    tokenizer=tokenizer,
                    adapter=_locate(folder, recipe.adapter, known.get("adapter_beside")) if named and recipe.adapter else None,
                    revision=recipe.revision if dense is None else None,
                    device=device,
                    dtype=getattr(torch, recipe.dense_dtype),
                )
            except DenseModelError as error:
                if dense is not None:
                    raise
                raise CheckpointError(
                    f"dense model of {str(folder)!r} not found:",
                    error.problem,
                    "; or ".join(filter(None, (error.remedy, "give its path with ‹dense›"))),
                ) from None
        dense = dense_of(dense, recipe.sparse.blocks)
        shapes = [(list(one["sublayers"]), one["vocabulary"], one["width"]) for one in (known, shape_facts(dense))]
        if fine_tuned and shapes[0] != shapes[1]:
            now, was = (f"{len(kinds)} sublayers of width {width}, {size:,} tokens" for kinds, size, width in shapes[::-1])
            raise CheckpointError(
                f"{dense.name!r} ({now})",
                f"is not a fine-tune of the dense model of {str(folder)!r} ({was})",
                "fit a new coupling to it",
            )
        if not fine_tuned and (difference := identity.difference(dense.identity())):
            raise CheckpointError(
                f"the dense model {dense.name!r}",
                f"is not the one {str(folder)!r} was fitted to ({fitted_to!r}): {difference}",
                "give that model with ‹dense›, or fit again",
            )
        state = {}
        for name, parameter in sparse.named_parameters():
            key = f"sparse.{name}"
            if name in sparse.sparse_weights():
                state[name] = unpack_nonzeros(key, tensors, parameter.shape[1])
            elif key in tensors:
                state[name] = tensors[key]
        prefix = "bridges."
        try:
            sparse.load_state_dict(state)
            bridges.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        except RuntimeError:
            raise CheckpointError(f"the tensors of {str(folder)!r}", "do not fit its recipe", "fetch or fit it again") from None
        sparse = sparse.to(dense.device).requires_grad_(False).eval()
        sparse.use_products()
        bridges.requires_grad_(False).eval()
        return CoupledModels(dense, sparse, bridges.to(dense.device), recipe, _reference(tensors), str(path))

    def push_to_hub(self, repo: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the coupling as a model repository on the Hugging Face hub; return its address."""
        import tempfile

        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as folder:
            self._write(Path(folder), repo, self._dense(None))
            api = HfApi(token=token)
            address = api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=folder)
        return str(address)

    def _dense(self, path: str | Path | None) -> dict[str, Any]:
        dense = self.dense
        name = dense.found_at(self.recipe.adapter) or dense.name
        return {
            "name": name,
            "beside": _relative_path(path, name),
            "adapter_beside": _relative_path(path, self.recipe.adapter),
            "revision": dense.revision,
            **dense.identity().to_json(),
            **shape_facts(dense),
            "parity": dense.parity.largest,
        }

    def _card(self, title: str) -> str:
        sparse = self.sparse
        return f"""---
library_name: bridge
tags: [interpretability, sparse, circuits]
---
# {title}

A weight-sparse transformer coupled to the dense model `{self.dense.name}` by a linear bridge at each of its {self.n_sites} sites
(Gao et al. 2025, arXiv 2511.13653, section 2.3). The sparse model has {len(sparse.blocks)} blocks of width {sparse.width}. Of its
weights {sparse.achieved_l0():.2%} are nonzero; in its blocks {sparse.achieved_fractions().blocks:.2%}. `coupling.json` holds
the recipe; `eval.json`, if present, shows how faithful the coupling is.

    import bridge
    coupling = bridge.load("{title}")
    print(bridge.explain(coupling, "some prompt"))
"""


def shape_facts(dense: DenseModel) -> dict[str, Any]:
    """Return the shape of a dense model, as stored with a coupling."""
    return {"sublayers": list(dense.sublayers), "vocabulary": dense.vocabulary, "width": dense.width}


def _check_numbers(folder: Path, tensors: dict[str, Tensor], vocabulary: int) -> None:
    """Raise CheckpointError for weights that are not finite, and for held-out text with tokens outside the vocabulary."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"the tensor {name} of {str(folder)!r}", "holds numbers that are not finite", "fetch or fit it again"
            )
    text_bt = tensors.get("reference_bt")
    if text_bt is not None and text_bt.numel() and not 0 <= int(text_bt.min()) <= int(text_bt.max()) < vocabulary:
        raise CheckpointError(
            f"the held-out text of {str(folder)!r}", f"has tokens outside 0 to {vocabulary - 1}", "fetch or fit it again"
        )


def local_folder(path: str | Path) -> Path:
    """Return the path itself, or the folder of a fetched hub id. Raises CheckpointError if the id cannot be fetched."""
    if Path(path).exists() or str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        raise CheckpointError(
            f"{str(path)!r}", f"is neither a folder here nor available from the hub ({type(error).__name__})"
        ) from None


def reference_text(path: str | Path) -> Tensor | None:
    """Return reference_bt, if any, of the coupling in a folder or on the hub. Raises CheckpointError if there is no coupling."""
    return _reference(read_folder(local_folder(path), "coupling")[0])


def _reference(tensors: dict[str, Tensor]) -> Tensor | None:
    return tensors["reference_bt"].long() if "reference_bt" in tensors else None


def _relative_path(path: str | Path | None, name: str | None) -> str | None:
    """Return a model's path relative to the coupling's folder, or None if either is not on this machine."""
    return os.path.relpath(name, path) if path and name and Path(name).exists() else None


def _locate(folder: Path, name: str, beside: str | None) -> str:
    """Return the path of a model now: relative to the folder, as when it was saved, or its name if it is not there."""
    if beside and (folder / beside).exists():
        short = os.path.normpath(folder / beside)  # a wrong place if the folder is reached by a link
        same = os.path.exists(short) and os.path.samefile(short, folder / beside)
        return short if same else os.path.realpath(folder / beside)
    return name


def new_coupling(dense: DenseModel, recipe: Recipe) -> CoupledModels:
    """Return an untrained coupling of the recipe's shape; its width and context must be resolved for the dense model."""
    sparse = new_sparse_model(recipe, dense.sublayers, dense.vocabulary)
    bridges = Bridges(dense.n_sites, dense.width, sparse.width, sparse.keep, seed=recipe.seed)
    return CoupledModels(dense, sparse.to(dense.device), bridges.to(dense.device), recipe)


def new_sparse_model(recipe: Recipe, sublayers: tuple[str, ...], vocabulary: int) -> SparseTransformer:
    """Return the untrained sparse model of a recipe, with the kinds of sublayer of the dense model or span."""
    kind = SparseTransformer if recipe.sparse.blocks is None else SparseSpan
    return kind(recipe.sparse, sublayers, vocabulary, recipe.data.context or 1, seed=recipe.seed)
