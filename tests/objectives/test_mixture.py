"""Online EM equals batch EM if it forgets nothing, on any devices, and is finite at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.mixture import GaussianMixture

from sop_jax.models.head import unit
from sop_jax.objectives.prototypical import mixture

DIM, COUNT, BATCH = 6, 5, 48


def features(seed: int, rows: int = BATCH) -> jax.Array:
    """Returns unit rows around three directions."""
    noise, which, centers = (jax.random.fold_in(jax.random.key(seed), i) for i in range(3))
    means = unit(jax.random.normal(centers, (3, DIM)))
    drawn = means[jax.random.randint(which, (rows,), 0, 3)]
    return unit(drawn + 0.3 * jax.random.normal(noise, (rows, DIM)))


def first() -> mixture.Mixture:
    return mixture.init_mixture(features(9, COUNT), 4.0, 0.1)


def empty() -> mixture.Mixture:
    return mixture.init_mixture(jnp.zeros((COUNT, DIM)), 0.0, 0.0)


def test_without_forgetting_it_is_batch_em() -> None:
    """The statistics of several batches, from no mass, are one step of scikit-learn's EM."""
    h = features(0)
    parts = mixture.components(first(), 0.0)
    found = empty()
    for part in h.reshape(4, -1, DIM):
        r = mixture.responsibilities(part, parts, 1.0)
        found = mixture.accumulate(found, part, r, 0.0)
    updated = mixture.components(found, 0.0)

    reference = GaussianMixture(
        COUNT,
        covariance_type="diag",
        max_iter=1,
        tol=0.0,
        reg_covar=0.0,
        weights_init=np.full(COUNT, 1 / COUNT),
        means_init=np.asarray(parts.means, np.float64),
        precisions_init=1 / np.asarray(parts.variances, np.float64),
    )
    with pytest.warns(match="did not converge"):  # after the one step that was asked for
        reference.fit(np.asarray(h, np.float64))
    np.testing.assert_allclose(jnp.exp(updated.log_weights), reference.weights_, rtol=1e-4)
    np.testing.assert_allclose(updated.means, reference.means_, atol=1e-5)
    np.testing.assert_allclose(updated.variances, reference.covariances_, atol=1e-5)


@pytest.mark.parametrize("forgetting", mixture.FORGETTING)
def test_devices_and_order_change_nothing(forgetting: str) -> None:
    def run(h: jax.Array) -> tuple[mixture.Mixture, jax.Array]:
        after = mixture.update(first(), h, 0.5, 0.1, 0.01, forgetting)
        return after, mixture.prototypes(after)

    h = features(1)
    expected = jax.jit(run)(h)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    found = jax.jit(run)(jax.device_put(h, NamedSharding(mesh, P("data"))))
    for order in (found, jax.jit(run)(h[::-1])):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), order, expected)
    half, _ = run(h[: BATCH // 2])
    assert np.abs(half.mass - expected[0].mass).max() > 0.1


def test_it_finds_the_clusters_of_its_features() -> None:
    rows = features(0, 4096)
    found = mixture.init_mixture(unit(jax.random.normal(jax.random.key(5), (3, DIM))), 8.0, 0.1)
    step = jax.jit(lambda found, h: mixture.update(found, h, 0.5, 0.05, 1e-3))
    for h in rows.reshape(-1, 64, DIM):
        found = step(found, h)
    centers = jax.random.fold_in(jax.random.key(0), 2)
    cosine = mixture.prototypes(found) @ unit(jax.random.normal(centers, (3, DIM))).T
    assert cosine.max(0).min() > 0.98
    assert sorted(cosine.argmax(0).tolist()) == [0, 1, 2]


@pytest.mark.parametrize("rows", [3, 20])
def test_it_starts_at_features(rows: int) -> None:
    """If there are fewer features than components, several start near the same one."""
    h = features(6, rows)
    found = mixture.start_at(h, jax.random.key(0), 8, 2.0, jnp.float32(1e-6))
    parts = mixture.components(found, 0.0)
    np.testing.assert_allclose(parts.means, h[np.arange(8) % rows], atol=0.01)
    assert np.abs(np.diff(parts.means[::3], axis=0)).max() > 1e-4
    np.testing.assert_allclose(found.mass, 2.0)


def test_a_smaller_beta_assigns_more_softly() -> None:
    parts = mixture.components(first(), 0.01)
    h = features(2)
    largest = [mixture.responsibilities(h, parts, beta).max(-1).mean() for beta in (1.0, 0.3, 0.0)]
    assert largest[0] > largest[1] > largest[2]
    np.testing.assert_allclose(largest[2], 1 / COUNT, rtol=1e-5)


@pytest.mark.parametrize("forgetting", mixture.FORGETTING)
def test_forgetting_bounds_the_mass(forgetting: str) -> None:
    """Plain forgetting converges to a mass of batch / eta; without any, it grows for ever."""
    h, eta = features(3), 0.2
    found = kept = first()
    step = jax.jit(lambda old, eta: mixture.update(old, h, 1.0, eta, 0.01, forgetting))
    for _ in range(100):
        found, kept = step(found, eta), step(kept, 0.0)
    np.testing.assert_allclose(kept.mass.sum(), 4 * COUNT + 100 * BATCH, rtol=1e-5)
    if forgetting == "plain":
        np.testing.assert_allclose(found.mass.sum(), BATCH / eta, rtol=1e-4)
    else:
        assert found.mass.sum() < 2 * COUNT * BATCH


@pytest.mark.parametrize("forgetting", mixture.FORGETTING)
@pytest.mark.parametrize(
    "h",
    [jnp.zeros((4, DIM)), jnp.tile(features(4, 1), (4, 1)), features(4, 1)],
    ids=["zeros", "duplicates", "one"],
)
def test_everything_is_finite(h: jax.Array, forgetting: str) -> None:
    step = jax.jit(lambda found: mixture.update(found, h, 1.0, 0.9, 1e-3, forgetting))
    for found in (first(), empty()):
        for _ in range(300):
            found = step(found)
        values = (found, mixture.components(found, 1e-3), mixture.prototypes(found))
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(values))


def test_no_array_has_the_product_of_all_sizes() -> None:
    compiled = (
        jax.jit(lambda found, h: mixture.update(found, h, 1.0, 0.1, 0.01))
        .lower(mixture.init_mixture(jnp.ones((256, 64)), 1.0, 0.1), jnp.ones((512, 64)))
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 512 * 256 * 64
