"""The features that a trained network gives to images, for evaluations and exports."""

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
    """The features of the n images of a source that could be read, in the source's order.

    Attributes:
        vectors: [CLS] after the final norm; the mean of the patches for a Swin, and for a ViT with
            `model.pool=mean`.
        patches: the L tokens of the patches, row by row; None unless requested.
        index: the record that each row belongs to.
        labels: the labels of these records, -1 where there are none.
        corrupt: the records that could not be read, which have no row.
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
    """Returns a function that computes the features of a source; its program is compiled once.

    Images are decoded as `config.data` says, resized so that the shorter side has
    `config.eval.resize` pixels, and centre-cropped to `config.eval.crop` pixels. A batch has
    `config.eval.batch_size` images, rounded up to a multiple of the number of devices. Of several
    hosts each decodes its share, and all receive all features.

    Args:
        model: the network.
        config: the config of the run.
        mesh: the devices to split the batches over.
        patches: whether to return the tokens of patches as well.

    Returns:
        A function `(params, source, progress=None, between=None) -> Features`. After each batch it
        calls `between()`, which may raise, and `progress(n)`, with the number of images in the
        batch.
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

    # Replicated, so that every host can read the results of all.
    forward = jax.jit(forward, out_shardings=replicated(mesh))

    def outputs(params: Params, source: Source) -> Iterator[dict[str, np.ndarray]]:
        """Yields the results of the batches, each fetched while the devices compute the next."""
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
        order = np.argsort(joined["index"])  # records alternate between hosts
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
    """Every `hosts`-th record of a source.

    All hosts have the same number of records; where the source has too few, the last is repeated.
    """

    def __init__(self, source: Source, host: int, hosts: int) -> None:
        rounds = -(-len(source) // hosts)
        self.source = source
        self.records = np.minimum(np.arange(rounds) * hosts + host, len(source) - 1)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> bytes | np.ndarray:
        return self.source[int(self.records[index])]

    def name(self, index: int) -> str:
        """Returns the source's name of one of this host's records."""
        return self.source.name(int(self.records[index]))

    @property
    def has_labels(self) -> bool:
        """Whether the source has labels."""
        return self.source.has_labels

    def label(self, index: int) -> int:
        """Returns the label of one of this host's records."""
        return self.source.label(int(self.records[index]))

    @property
    def class_names(self) -> list[str] | None:
        """The class names of the source."""
        return self.source.class_names

    @property
    def digest(self) -> str:
        """The digest of the whole source."""
        return self.source.digest


def host_batches(
    source: Source,
    eval_config: Any,
    batch_size: int,
    host: int,
    hosts: int,
    how: Decoding = AS_STORED,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields one host's part of the batches of `eval_batches`, with indices into the whole source.

    All hosts yield the same number of batches, for any size of the source. Each record is valid or
    corrupt on exactly one of them.

    Args:
        source: the images.
        eval_config: `config.eval` of the run.
        batch_size: the number of images per batch and host.
        host: the number of this host.
        hosts: the number of hosts.
        how: how images are decoded.
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
