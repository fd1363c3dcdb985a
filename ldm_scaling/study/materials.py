"""What the stages share, loaded once: encoders, prepared data, the frozen first stage, scorer."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling import files
from ldm_scaling.config import Study
from ldm_scaling.data import builder, cache
from ldm_scaling.errors import UserError
from ldm_scaling.metrics import agreement, moments
from ldm_scaling.metrics.frechet import ReferenceStats
from ldm_scaling.models import autoencoder, efficientnet, text_encoder, unet, zoo
from ldm_scaling.parallel import hosts
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.study.sweep import Prompts, Scorer, block_indices
from ldm_scaling.study.workdir import Workdir
from ldm_scaling.tasks import autoencoder as autoencoder_task
from ldm_scaling.tasks.text_to_image import Drawer, Frozen
from ldm_scaling.training import checkpoint, step

log = logging.getLogger(__name__)

SPLITS = ("train", "validation")
LAYER = "trunk"
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
    def pictures(self) -> dict[str, Any]:
        """Split -> random access to `image`, `caption`, `concept`, prepared if need be."""
        return builder.prepare(self.workdir / "data", self.study.data)

    @functools.cached_property
    def text_encoder(self) -> text_encoder.TextEncoder:
        """The frozen text encoder."""
        return text_encoder.load(self.study.data.text_length)

    def text(self, split: str) -> cache.CacheSource:
        """Random access to `context` (L, D) float16 and `embedding` (E,) of a split's captions."""
        path = self.workdir / "data" / f"text_{split}.array_record"
        identity = files.sha256_of([self.text_encoder.hash, self.pictures[split].hash])
        if not path.exists():
            source = self.pictures[split]

            def rows():
                with files.progress(len(source), f"text states, {split}", "caption") as bar:
                    for start in range(0, len(source), 256):
                        stop = min(start + 256, len(source))
                        texts = [source[i]["caption"] for i in range(start, stop)]
                        states, _, embeddings = self.text_encoder.encode(texts)
                        for state, embedding in zip(states, embeddings, strict=True):
                            yield {
                                "context": state.astype(np.float16),
                                "embedding": embedding.astype(np.float32),
                            }
                        bar.update(stop - start)

            cache.write(path, rows(), {"hash": identity})
        return cache.CacheSource(path, expect_hash=identity)

    @functools.cached_property
    def null_context(self) -> np.ndarray:
        """Text states of the empty caption, (L, D)."""
        return self.text_encoder.states([""])[0][0]

    # Devices.

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """The device mesh of the config."""
        return mesh_lib.make(self.study.mesh.data, self.study.mesh.fsdp)

    # First stage.

    @functools.cached_property
    def autoencoder_params(self) -> Any:
        """The trained autoencoder's averaged parameters."""
        spec = autoencoder_task.spec_of(self.study.autoencoder)
        return self._restored(
            functools.partial(autoencoder.init, spec), self.study.autoencoder.train,
            self.workdir / "autoencoder", "the autoencoder",
        )

    def _restored(self, init, config, directory, what: str) -> Any:
        folder = directory / "checkpoints"
        with checkpoint.Checkpoints(folder, config.keep) as checkpoints:
            if checkpoints.latest() != config.steps:
                raise UserError(
                    f"{what} is not trained: {folder} holds step {checkpoints.latest() or 0} of "
                    f"{config.steps}; run  ldm-scaling train  with the same --config and --workdir"
                )
            state, _ = checkpoints.restore(step.abstract_state(init, config, self.mesh))
        return state.ema

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the latents. Raises `UserError` when a picture does not halve that often."""
        spec = autoencoder_task.spec_of(self.study.autoencoder)
        side = self.study.data.side
        if side % spec.downsampling:
            raise UserError(
                f"config: data.side={side} is not a multiple of the autoencoder's downsampling "
                f"{spec.downsampling}"
            )
        return (side // spec.downsampling, side // spec.downsampling, spec.latent_channels)

    def latents(self, split: str) -> cache.CacheSource:
        """Random access to the posterior's `mean` and `logvar` of a split's pictures."""
        path = self.workdir / "latents" / f"{split}.array_record"
        identity = self.study.training_hash(None)
        if not path.exists():
            spec = autoencoder_task.spec_of(self.study.autoencoder)
            dtype = hosts.compute_dtype(self.study.autoencoder.train.compute_dtype)
            encode = jax.jit(
                lambda p, x: autoencoder.encode(spec, p, x.astype(jnp.float32) / 127.5 - 1, dtype)
            )
            source, batch = self.pictures[split], 128
            total, count = np.zeros(2), 0

            def rows():
                nonlocal count
                with files.progress(len(source), f"latents, {split}", "picture") as bar:
                    for start in range(0, len(source), batch):
                        stop = min(start + batch, len(source))
                        x = np.stack([source[i]["image"] for i in range(start, stop)])
                        fill = [(0, batch - len(x))] + [(0, 0)] * 3
                        posterior = encode(self.autoencoder_params, np.pad(x, fill, mode="edge"))
                        mean = np.asarray(posterior.mean)[: len(x)]
                        logvar = np.asarray(posterior.logvar)[: len(x)]
                        total[0] += mean.sum(dtype=np.float64)
                        total[1] += (mean.astype(np.float64) ** 2 + np.exp(logvar)).sum()
                        count += mean.size
                        for m, v in zip(mean, logvar, strict=True):
                            yield {"mean": m, "logvar": v}
                        bar.update(len(x))

            def meta():
                variance = total[1] / count - (total[0] / count) ** 2
                return {"hash": identity, "latent_std": float(np.sqrt(variance))}

            cache.write(path, rows(), meta)
        return cache.CacheSource(path, expect_hash=identity)

    @functools.cached_property
    def frozen(self) -> Frozen:
        """The trained first stage with its measured latent scale."""
        shape = self.latent_shape
        return Frozen(
            autoencoder_spec=autoencoder_task.spec_of(self.study.autoencoder),
            autoencoder_params=self.autoencoder_params,
            latent_scale=1.0 / self.latents("train").meta["latent_std"],
            latent_shape=shape,
            null_ctx_LD=self.null_context,
            text_hash=self.text_encoder.hash,
        )

    @functools.cached_property
    def decode(self):
        """The jitted decoder, shared by all members."""
        return self.frozen.decoder()

    # Members.

    def spec(self, member: str) -> unet.UNetSpec:
        """A member's network. Raises `UserError` when it does not take these latents."""
        spec = zoo.get(member).spec
        if spec.latent_shape != self.latent_shape:
            raise UserError(
                f"member {member} takes latents of {spec.latent_shape}, but data.side="
                f"{self.study.data.side} and this autoencoder make {self.latent_shape}: change "
                "data.side, the autoencoder's levels or the members"
            )
        return spec

    def drawer(self, member: str, batch_size: int) -> Drawer:
        """What draws pictures with a member's network."""
        return Drawer(
            self.spec(member), self.frozen, self.study.diffusion, batch_size, self.decode,
            self.study.train.compute_dtype,
        )

    def member_params(self, member: str) -> Any:
        """A trained member's averaged parameters."""
        return self._restored(
            functools.partial(unet.init, self.spec(member)), self.study.train,
            self.workdir.member(member), f"member {member}",
        )

    @functools.cached_property
    def validation(self) -> dict[str, np.ndarray]:
        """The fixed part of the validation split that validation losses are computed on."""
        n = min(VALIDATION_EXAMPLES, len(self.pictures["validation"]))
        latents, text = self.latents("validation"), self.text("validation")
        return {
            "mean": np.stack([latents[i]["mean"] for i in range(n)]),
            "context": np.stack([text[i]["context"] for i in range(n)]),
            "index": np.arange(n, dtype=np.int32),
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
                split: np.stack([self.text(split)[i]["embedding"] for i in range(len(real[split]))])
                for split in SPLITS
            }
            concepts = np.array(
                [self.pictures["train"][i]["concept"] for i in range(len(real["train"]))]
            )
            probe = agreement.fit(
                real["train"], embeddings["train"], groups_N=concepts, extractor=extractor,
                encoder=self.text_encoder.hash,
            )
            sanity = agreement.sanity(probe, real["validation"], embeddings["validation"])
            log.info("caption probe on real validation pairs: %s", sanity)
            files.atomic_write_text(
                folder / "probe_sanity.json", json.dumps(dataclasses.asdict(sanity), indent=1)
            )
            moments.save(reference_path, moments.Moments.of(real["validation"]), extractor)
            agreement.save(probe_path, probe)
        return Scorer(
            features=features,
            reference=ReferenceStats(moments.load(reference_path, extractor), extractor),
            probe=agreement.load(probe_path),
            replicates=self.study.sweep.replicates,
        )

    def _real_features(self, split: str, features) -> np.ndarray:
        source, out = self.pictures[split], []
        with files.progress(len(source), f"features of real pictures, {split}", "picture") as bar:
            for start in range(0, len(source), 256):
                stop = min(start + 256, len(source))
                out.append(features(np.stack([source[i]["image"] for i in range(start, stop)])))
                bar.update(stop - start)
        return np.concatenate(out)

    @functools.cache
    def prompts(self, block: int) -> Prompts:
        """A seed block's captions."""
        source = self.text("validation")
        index = block_indices(
            block, self.study.sweep.num_images, len(source), self.study.data.seed
        )
        rows = [source[int(i)] for i in index]
        return Prompts(
            index_N=index.astype(np.int32),
            context_NLD=np.stack([r["context"] for r in rows]).astype(np.float32),
            embeddings_NE=np.stack([r["embedding"] for r in rows]),
        )

    def shown(self, split: str = "validation") -> np.ndarray:
        """The first pictures of a split, uint8."""
        n = min(SHOWN_EXAMPLES, len(self.pictures[split]))
        return np.stack([self.pictures[split][i]["image"] for i in range(n)])

