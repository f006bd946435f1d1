"""The embeddings of images that are compared with prototypes."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32

from sop_jax.data.sources import Source
from sop_jax.data.subsets import Subset
from sop_jax.diagnosis.subjects import Item
from sop_jax.errors import UserError
from sop_jax.evaluation.task import Subject
from sop_jax.evaluation.tools import Toolbox
from sop_jax.evaluation.views import view_of
from sop_jax.models import Model, Params, build
from sop_jax.parallel.mesh import make_mesh, put, replicated
from sop_jax.pretrained import load_network, network_of_file
from sop_jax.weights.recognition import rank_of

COMPARED = ("cls", "patches", "patch_features")  # what an image alone determines


class Images(NamedTuple):
    """Images to compare with prototypes.

    Attributes:
        source: the images.
        config: `config.data` that describes them.
    """

    source: Source
    config: ml_collections.ConfigDict


class Networks:
    """The networks that prototypes belong to, and the embeddings of images by the current one.

    Args:
        images: those of each run and file; None for none.
        network: `teacher` or `student`, of runs; the teacher by default.
        heads: the number of heads of a ViT in a file whose size has no name.
        batch_size: the number of images that are embedded at a time; by default as in the run.
        seed: draws the patch of each image.
    """

    def __init__(
        self,
        images: Mapping[str, Images | None],
        network: str | None,
        heads: int | None,
        batch_size: int | None,
        seed: int,
    ) -> None:
        self.images, self.network, self.heads = images, network or "teacher", heads
        self.batch_size, self.seed, self.mesh = batch_size, seed, make_mesh()
        self._of: tuple[str, int | None] | None = None  # the checkpoint that is loaded
        self._loaded: Subject | None = None
        self._kept: dict[str, Float32[np.ndarray, "N d"]] = {}

    def embeddings_of(
        self, item: Item, note: Callable[[str], None]
    ) -> tuple[Float32[np.ndarray, "N d"] | None, str | None]:
        """Returns what is compared with prototypes, or None and the reason why there is nothing.

        Args:
            item: the prototypes.
            note: shows a line before the images are embedded.
        """
        compared, dim = item.subject.compared, item.subject.rows.shape[1]
        images = self.images[item.run]
        if images is None:
            return None, "a file names no images; give some with --data.path"
        if compared not in COMPARED:
            return None, "what is compared with these prototypes depends on masks"
        if self._of != (item.run, item.step):
            self._of, self._loaded, self._kept = (item.run, item.step), None, {}
        try:
            network = self._loaded = self._loaded or self._load(item, images)
        except UserError as error:
            if item.step is not None:
                raise
            return None, f"its network cannot be used: {error}"
        if compared not in self._kept:
            note(f"embedding {len(images.source)} images by {item.run}")
            self._kept[compared] = embed(network, images.source, compared, self.mesh, self.seed)
        found = self._kept[compared]
        if found.shape[1] != dim:
            return None, f"the network gives {found.shape[1]} numbers, the prototypes have {dim}"
        return found, None

    def _load(self, item: Item, images: Images) -> Subject:
        """Returns the network that prototypes belong to, with its head."""
        if item.step is not None:
            config, model, params, _ = load_network(item.run, item.step, self.network)
        else:
            key = {1: "teacher", -1: "student"}.get(rank_of(item.subject.layer))
            config, params, absent, _ = network_of_file(
                epath.Path(item.run), key, None, self.heads, None, False
            )
            if any(path.startswith("head/") for path in absent):
                raise UserError("its head has other layers than those that can be read")
            model = build(config, config.augment.global_size)
            everywhere = replicated(self.mesh)
            params = jax.tree.map(lambda leaf: put(np.asarray(leaf), everywhere), params)
        config.data = images.config
        config.eval.batch_size = self.batch_size or config.eval.batch_size
        return Subject(item.run, config, model, params, "", item.step)


def draw(source: Source, most: int, seed: int) -> Source:
    """Returns at most `most` images of a source, drawn by seed, in the order of the source."""
    if len(source) <= most:
        return source
    drawn = np.random.default_rng(seed).permutation(len(source))[:most]
    return Subset(source, np.sort(drawn))


def embed(
    network: Subject,
    source: Source,
    compared: str,
    mesh: Mesh,
    seed: int,
) -> Float32[np.ndarray, "n d"]:
    """Returns one vector for each image that can be read; all processes call it.

    The images are split over the devices, and seen as in evaluations: a centre crop without
    augmentation.

    Args:
        network: the network, with its head.
        source: the images.
        compared: one of COMPARED: the embedding of [CLS], that of a patch, or the features of a
            patch before the head. The patch is drawn for each image, by `seed` and its pixels.
        mesh: the devices.
        seed: draws the patches.
    """
    model = network.model._replace(features=_only(network.model, compared, seed))
    tools = Toolbox(network._replace(model=model), mesh, seed=seed)
    return tools.whole(tools.features(source, view_of(network.config))).vectors


def _only(model: Model, compared: str, seed: int) -> Callable[..., list[Array]]:
    """Returns a function in place of `Model.features`, whose only token is what is compared."""

    def token(params: Params, images: Array) -> Float[Array, "B d"]:
        if compared == "cls":
            return model.embed(params, images, None, None, patches=False)[0]
        tokens = model.features(params, images, last=1)[-1][:, 1:]
        where = _draw_patches(images, tokens.shape[1], seed)
        if compared == "patches":
            return model.embed(params, images, None, None, patches=where)[1][:, 0]
        return jnp.take_along_axis(tokens, where[..., None], axis=1)[:, 0]

    def features(params: Params, images: Array, **_: Any) -> list[Array]:
        return [token(params, images)[:, None]]

    return features


def _draw_patches(images: Array, count: int, seed: int) -> Array:
    """Returns the index [B, 1] of a patch of each image, whatever batch the image is in."""
    sums = images.astype(jnp.uint32).sum(axis=(1, 2, 3))

    def draw_one(total: Array) -> Array:
        return jax.random.randint(jax.random.fold_in(jax.random.key(seed), total), (1,), 0, count)

    return jax.vmap(draw_one)(sums)
