"""What the stages share, loaded once: encoders, prepared data, the frozen first stage, scorer."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling import files
from ldm_scaling.config import Study
from ldm_scaling.data import builder, cache, loader
from ldm_scaling.errors import UserError
from ldm_scaling.metrics import agreement, moments
from ldm_scaling.metrics.frechet import ReferenceStats
from ldm_scaling.models import autoencoder, efficientnet, text_encoder, unet
from ldm_scaling.parallel import hosts
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.study import networks as networks_lib
from ldm_scaling.study import published
from ldm_scaling.study.scorer import Scorer
from ldm_scaling.study.sweep import Prompts, block_indices
from ldm_scaling.study.workdir import Workdir
from ldm_scaling.tasks import autoencoder as autoencoder_task
from ldm_scaling.tasks.drawing import Drawer, Frozen

log = logging.getLogger(__name__)

SPLITS = ("train", "validation")
LAYER = "trunk"
SANITY = "reference/probe_sanity.json"
# A fixed part of the validation split: for losses along the way, and for pictures.
VALIDATION_EXAMPLES = 512
SHOWN_EXAMPLES = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Materials:
    """A study's shared parts; each is made, or read from the workdir, when first asked for."""

    study: Study
    workdir: Workdir

    # Data.

    @functools.cached_property
    def prepared(self) -> builder.Prepared:
        """The composed pictures, made if need be."""
        data = self.study.data
        spec = builder.ComposedSpec(
            data.side, data.train_pictures, data.validation_pictures, data.seed
        )
        return builder.prepare(self.workdir / "data", spec)

    def source(self, split: str, *fields: str) -> loader.ImageSource:
        """Random access to a split's pictures: some of `image`, `caption`, `concept`, `index`."""
        return loader.image_source(self.prepared, split, fields)

    @functools.cached_property
    def text_encoder(self) -> text_encoder.TextEncoder:
        """The study's own text encoder: its states train networks, its sentences are scored by."""
        return text_encoder.load(self.study.data.text_length)

    @functools.cache  # noqa: B019  One object a run.
    def text(self, split: str) -> cache.CacheSource:
        """Random access to `context` (L, D) float16 and `embedding` (E,) of a split's captions."""
        path = self.workdir / "data" / f"text_{split}.array_record"
        hash = files.sha256_of([self.text_encoder.hash, self.prepared.hash])
        if not path.exists():
            captions = self.source(split, "caption")

            def batches():
                with files.progress(len(captions), f"text states, {split}", "caption") as bar:
                    for index in _slices(len(captions), 256):
                        texts = captions.batch(index)["caption"].tolist()
                        states, _, embeddings = self.text_encoder.encode(texts)
                        yield {"context": states.astype(np.float16), "embedding": embeddings}
                        bar.update(len(index))

            cache.write(path, cache.rows(batches()), {"hash": hash})
        return cache.CacheSource(path, hash)

    def states(self, texts: Sequence[str]) -> np.ndarray:
        """Text states of captions for the networks, (P, L, D), as exact as they are kept."""
        return self.networks.states(texts).astype(self.networks.states_dtype)

    def _contexts(self, captions: tuple[str, ...]) -> np.ndarray:
        """Text states by published networks' own encoder, (N, L, D), kept in the workdir."""
        hash = files.sha256_of([self.networks.text_hash(), captions])
        path = self.workdir / "data" / f"context_{hash}.array_record"
        if not path.exists():

            def batches():
                with files.progress(len(captions), "text states", "caption") as bar:
                    for index in _slices(len(captions), 64):
                        yield {"context": self.states([captions[i] for i in index])}
                        bar.update(len(index))

            cache.write(path, cache.rows(batches()), {"hash": hash})
        return cache.CacheSource(path, hash).batch(range(len(captions)))["context"]

    # Devices.

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """The device mesh of the config."""
        return mesh_lib.make(self.study.mesh.data, self.study.mesh.fsdp)

    # Networks.

    @functools.cached_property
    def networks(self) -> networks_lib.Networks:
        """What draws pictures: the networks that the study trains, or published ones."""
        if self.study.weights:
            return published.networks(self.study, self.workdir, self.mesh)
        return networks_lib.trained(self)

    def require_trained(self, members: Iterable[str] | None = None) -> None:
        """Raises `UserError` naming the first network, of all members or of these, that is not
        trained."""
        self.networks.require(self.study.members if members is None else members)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the latents. Raises `UserError` when a picture does not halve that often."""
        spec = self.networks.decoder_spec
        side = self.study.data.side
        if side % spec.downsampling:
            raise UserError(
                f"config: data.side={side} is not a multiple of the autoencoder's downsampling "
                f"{spec.downsampling}"
            )
        return (side // spec.downsampling, side // spec.downsampling, spec.latent_channels)

    @functools.cache  # noqa: B019
    def latents(self, split: str) -> cache.CacheSource:
        """Random access to the posterior's `mean` and `logvar` of a split's pictures."""
        path = self.workdir / "latents" / f"{split}.array_record"
        hash = self.study.training_hash(None)
        if not path.exists():
            images, meta = self.source(split, "image"), {"hash": hash}
            cache.write(path, cache.rows(self._encoded(images, split, meta)), meta)
        return cache.CacheSource(path, hash)

    def _encoded(self, images: loader.ImageSource, split: str, meta: dict[str, Any]):
        """Batches of `mean` and `logvar`; at the end `meta` holds the latents' deviation."""
        spec = autoencoder_task.spec_of(self.study.autoencoder)
        dtype = hosts.compute_dtype(self.study.autoencoder.train.compute_dtype)
        encode = jax.jit(
            lambda p, x: autoencoder.encode(spec, p, x.astype(jnp.float32) / 127.5 - 1, dtype)
        )
        size = -(-128 // self.mesh.size) * self.mesh.size
        total, squares, count = 0.0, 0.0, 0
        with files.progress(len(images), f"latents, {split}", "picture") as bar:
            for index in _slices(len(images), size):
                x = images.batch(index)["image"]
                fill = [(0, size - len(x))] + [(0, 0)] * 3
                x_BHWC = mesh_lib.put_batch(self.mesh, np.pad(x, fill, mode="edge"))
                posterior = encode(self.networks.decoder(), x_BHWC)
                mean = np.asarray(posterior.mean)[: len(x)]
                logvar = np.asarray(posterior.logvar)[: len(x)]
                total += mean.sum(dtype=np.float64)
                squares += (mean.astype(np.float64) ** 2 + np.exp(logvar)).sum()
                count += mean.size
                yield {"mean": mean, "logvar": logvar}
                bar.update(len(x))
        meta["latent_std"] = float(np.sqrt(squares / count - (total / count) ** 2))

    @functools.cached_property
    def frozen(self) -> Frozen:
        """What is the same under every member."""
        return Frozen(
            decoder_spec=self.networks.decoder_spec,
            decoder_params=self.networks.decoder(),
            latent_scale=self.networks.latent_scale(),
            latent_shape=self.latent_shape,
            null_ctx_LD=self.networks.states([""])[0],
        )

    @functools.cached_property
    def decode(self):
        """The jitted decoder, shared by all members."""
        return self.frozen.decoder()

    # Members.

    def spec(self, member: str) -> unet.UNetSpec:
        """A member's network. Raises `UserError` when it does not take these latents."""
        spec = self.networks.spec(member)
        if spec.latent_shape != self.latent_shape:
            raise UserError(
                f"member {member} takes latents of {spec.latent_shape}, but data.side="
                f"{self.study.data.side} and this autoencoder make {self.latent_shape}: change "
                "data.side, the autoencoder's levels or the members"
            )
        return spec

    @functools.cache  # noqa: B019
    def drawer(self, member: str) -> Drawer:
        """What draws pictures with a member's network; compiled once for every stage."""
        return Drawer(
            self.spec(member), self.frozen, self.study.diffusion, self.study.sweep.batch_size,
            self.decode, self.mesh, self.study.train.compute_dtype,
        )

    def member_params(self, member: str) -> Any:
        """A member's parameters, averaged over its training."""
        return self.networks.params(member)

    @functools.cached_property
    def validation(self) -> dict[str, np.ndarray]:
        """The fixed part of the validation split that validation losses are computed on."""
        index = np.arange(min(VALIDATION_EXAMPLES, self.study.data.validation_pictures))
        return {
            "mean": self.latents("validation").batch(index)["mean"],
            "context": self.text("validation").batch(index)["context"],
            "index": index.astype(np.int32),
        }

    # Metrics.

    @functools.cached_property
    def feature_network(self) -> efficientnet.FeatureNetwork:
        """The pretrained network whose features are compared."""
        return efficientnet.load(self.study.sweep.feature_side)

    @functools.cached_property
    def scorer(self) -> Scorer:
        """Reference statistics of all validation pictures, and the probe of the training ones."""
        network = self.feature_network
        extractor = network.layer_hash(LAYER)

        def features(images):
            return network.features(images)[LAYER]

        folder = self.workdir / "reference"
        reference_path, probe_path = folder / "validation.npz", folder / "probe.npz"
        if not (reference_path.exists() and probe_path.exists()):
            real = {split: self._real_features(split, features) for split in SPLITS}
            embeddings = {
                split: self.text(split).batch(range(len(real[split])))["embedding"]
                for split in SPLITS
            }
            concepts = self.source("train", "concept").batch(range(len(real["train"])))["concept"]
            probe = agreement.fit(
                real["train"], embeddings["train"], groups_N=concepts, extractor=extractor,
                encoder=self.text_encoder.hash,
            )
            sanity = agreement.sanity(probe, real["validation"], embeddings["validation"])
            log.info("caption probe on real validation pairs: %s", sanity)
            files.atomic_write_text(
                self.workdir / SANITY, json.dumps(dataclasses.asdict(sanity), indent=1)
            )
            agreement.save(probe_path, probe)
            moments.save(reference_path, moments.Moments.of(real["validation"]), extractor)
        return Scorer(
            features=features,
            reference=ReferenceStats(moments.load(reference_path, extractor), extractor),
            probe=agreement.load(probe_path),
            replicates=self.study.sweep.replicates,
        )

    def _real_features(self, split: str, features) -> np.ndarray:
        images, out = self.source(split, "image"), []
        with files.progress(len(images), f"features of real pictures, {split}", "picture") as bar:
            for index in _slices(len(images), 256):
                out.append(features(images.batch(index)["image"]))
                bar.update(len(index))
        return np.concatenate(out)

    @functools.cache  # noqa: B019
    def prompts(self, block: int) -> Prompts:
        """A seed block's captions."""
        index = block_indices(
            block, self.study.sweep.num_images, self.study.data.validation_pictures,
            self.study.data.seed,
        )
        rows = self.text("validation").batch(index)
        captions = tuple(self.source("validation", "caption").batch(index)["caption"].tolist())
        own = self.networks.text_hash is None
        return Prompts(
            index_N=index.astype(np.int32),
            context_NLD=rows["context"] if own else self._contexts(captions),
            embeddings_NE=rows["embedding"],
            captions=captions,
        )

    def shown(self) -> np.ndarray:
        """The first validation pictures, uint8."""
        n = min(SHOWN_EXAMPLES, self.study.data.validation_pictures)
        return self.source("validation", "image").batch(range(n))["image"]


def _slices(total: int, size: int):
    for start in range(0, total, size):
        yield range(start, min(start + size, total))
