"""Features of images: what evaluations and exports see of a trained network."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float16, Float32, Int32

from sop_jax.data.decode import AS_STORED, Decoding, decoding
from sop_jax.data.pipeline import eval_batches
from sop_jax.data.sources import Source
from sop_jax.models import Model, Params
from sop_jax.parallel.mesh import replicated, to_devices


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of the images of a source that could be read, in the source's order.

    Attributes:
        vectors: [CLS] after the final norm; a Swin's is the mean of its tokens.
        patches: tokens of the patches, row by row, where asked for.
        index: which record each row belongs to.
        labels: of these records, -1 where there are none.
        corrupt: records that could not be read; they have no row.
    """

    vectors: Float32[np.ndarray, "n D"]
    patches: Float16[np.ndarray, "n L D"] | None
    index: Int32[np.ndarray, " n"]
    labels: Int32[np.ndarray, " n"]
    corrupt: list[int]


Extract = Callable[..., Features]


def make_extractor(
    model: Model, config: ml_collections.ConfigDict, mesh: Mesh, patches: bool = False
) -> Extract:
    """A function that computes the features of a source; compiled once, however often it is used.

    Images are decoded as `config.data` says, resized to `config.eval.resize` and centre-cropped to
    `config.eval.crop`; a batch has `config.eval.batch_size` of them, rounded up to what the devices
    divide. Every host of several decodes its share, and all of them get all features.

    Args:
        model: the network.
        config: of the run.
        mesh: devices to split the batches over.
        patches: also return the tokens of patches.

    Returns:
        (params, source, progress=None, between=None) -> Features. `progress` is called with the
        number of images done since its last call, `between` between two batches: it may raise.
    """
    host, hosts = jax.process_index(), jax.process_count()
    devices = mesh.devices.size
    batch_size = -(-config.eval.batch_size // devices) * devices

    def forward(params: Params, batch: dict[str, Array]) -> dict[str, Array]:
        (tokens,) = model.features(params, batch["image"])
        outputs = {name: batch[name] for name in ("index", "label", "corrupt", "valid")}
        outputs["vectors"] = tokens[:, 0].astype(jnp.float32)
        if patches:
            outputs["patches"] = tokens[:, 1:].astype(jnp.float16)
        return outputs

    # Replicated, so that every host can read what all of them made.
    forward = jax.jit(forward, out_shardings=replicated(mesh))

    def outputs(params: Params, source: Source) -> Iterator[dict[str, np.ndarray]]:
        """Results of the batches, fetched while the devices work on the next one."""
        pending = None
        how = decoding(config.data, source)
        for batch in host_batches(source, config.eval, batch_size // hosts, host, hosts, how):
            done, pending = pending, forward(params, to_devices(mesh, batch))
            if done is not None:
                yield jax.device_get(done)
        yield jax.device_get(pending)

    def extract(
        params: Params,
        source: Source,
        progress: Callable[[int], Any] | None = None,
        between: Callable[[], Any] | None = None,
    ) -> Features:
        kept: list[dict[str, np.ndarray]] = []
        corrupt: list[int] = []
        for output in outputs(params, source):
            bad, valid = output.pop("corrupt"), output.pop("valid")
            corrupt.extend(bad[bad >= 0].tolist())
            kept.append({name: array[valid] for name, array in output.items()})
            if between:
                between()
            if progress:
                progress(int(valid.sum() + (bad >= 0).sum()))
        joined = {name: np.concatenate([part[name] for part in kept]) for name in kept[0]}
        order = np.argsort(joined["index"])  # hosts take turns
        joined = {name: array[order] for name, array in joined.items()}
        return Features(
            joined["vectors"],
            joined.get("patches"),
            joined["index"],
            joined["label"],
            sorted(corrupt),
        )

    return extract


class HostShare:
    """Every `hosts`-th record of a source; equally many for each host, the last ones repeated."""

    def __init__(self, source: Source, host: int, hosts: int) -> None:
        rounds = -(-len(source) // hosts)
        self.source = source
        self.records = np.minimum(np.arange(rounds) * hosts + host, len(source) - 1)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> bytes | np.ndarray:
        return self.source[int(self.records[index])]

    def name(self, index: int) -> str:
        """As the source calls it."""
        return self.source.name(int(self.records[index]))

    @property
    def has_labels(self) -> bool:
        """As the source."""
        return self.source.has_labels

    def label(self, index: int) -> int:
        """Of one of this host's records."""
        return self.source.label(int(self.records[index]))

    @property
    def class_names(self) -> list[str] | None:
        """Of the source."""
        return self.source.class_names

    @property
    def digest(self) -> str:
        """Of the source."""
        return self.source.digest


def host_batches(
    source: Source,
    eval_config: Any,
    batch_size: int,
    host: int,
    hosts: int,
    how: Decoding = AS_STORED,
) -> Iterator[dict[str, np.ndarray]]:
    """One host's part of the batches that `eval_batches` makes, with indices of the whole source.

    Hosts get equally many batches, whatever the size of the source; each record is valid, or
    corrupt, on exactly one of them.
    """
    share = HostShare(source, host, hosts)
    for batch in eval_batches(share, eval_config.resize, eval_config.crop, batch_size, how):
        index = batch["index"] * hosts + host
        inside = index < len(source)
        yield batch | {
            "index": index,
            "valid": batch["valid"] & inside,
            "corrupt": np.where(inside & (batch["corrupt"] >= 0), index, -1),
        }
