"""What the stages share, loaded once: encoders, prepared data, the frozen first stage, scorer."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from ldm_scaling import files
from ldm_scaling.config import Diffusion, Study, Train
from ldm_scaling.data import cache
from ldm_scaling.data.loading.mixture import Mixture
from ldm_scaling.data.loading.source import Source
from ldm_scaling.errors import UserError
from ldm_scaling.metrics import agreement, moments
from ldm_scaling.metrics.frechet import ReferenceStats
from ldm_scaling.models import backbone, cost, efficientnet, pretrained, text_encoder
from ldm_scaling.parallel import hosts, processes
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.study import (
    caches,
    datasets,
    encoders,
    fitting,
    preparing,
    published,
    published_scorer,
)
from ldm_scaling.study import networks as networks_lib
from ldm_scaling.study.published_scorer import Published, WithPublished
from ldm_scaling.study.scorer import Scorer
from ldm_scaling.study.sweep import Prompts, block_indices
from ldm_scaling.study.workdir import Workdir
from ldm_scaling.tasks.drawing import Drawer, Frozen

log = logging.getLogger(__name__)

SPLITS = ("train", "validation")
LAYER = "trunk"
REFERENCE = "reference"
SANITY = f"{REFERENCE}/probe_sanity.json"
LATENT_SCALE = "latent_scale.json"
# A fixed part of the validation split: for losses along the way, and for pictures.
VALIDATION_EXAMPLES = 512
SHOWN_EXAMPLES = 64
# What the probe of caption agreement is fitted on at most.
PROBE_PICTURES = 50_000


@dataclasses.dataclass(frozen=True, eq=False)
class Materials:
    """A study's shared parts; each is made, or read from the workdir, when first asked for.

    Networks lie on the devices of all processes, and all must ask for them and use them together.
    `own` are the same materials on this process's devices: frozen encoders and sweeps run there,
    each process at its own pace. With one process both are one.

    Attributes:
      study: the config.
      workdir: where it works.
      alone: whether these are some process's own.
    """

    study: Study
    workdir: Workdir
    alone: bool = False

    @functools.cached_property
    def own(self) -> Materials:
        """These materials on this process's devices."""
        if self.alone or not processes.several():
            return self
        return dataclasses.replace(self, alone=True)

    # Data.

    @functools.cached_property
    def datasets(self) -> tuple[datasets.Dataset, ...]:
        """The pictures and captions, prepared if need be. Raises `UserError` where there are too
        few for the config's batches and its sweep."""
        if self.own is not self:
            return self.own.datasets
        with processes.lead_first("data"):
            found = preparing.of(self.study.data, self.workdir / "data")
        counts = (sum(d.count(split) for d in found) for split in SPLITS)
        self.study.check_counts(*counts, total=sum(d.total for d in found))
        return found

    @functools.cached_property
    def prepared(self) -> bool:
        """Whether the pictures and captions are there, so that `datasets` makes none."""
        return preparing.prepared(self.study.data, self.workdir / "data")

    def check_names(self) -> None:
        """Raises `UserError` where a collection that is not prepared has too few pictures for the
        config's batches and its sweep by the names of its files alone."""
        if self.prepared or not hosts.is_lead():
            return
        most = preparing.at_most(self.study.data, self.workdir / "data")
        if most is not None:
            self.study.check_counts(*most)

    def count(self, split: str) -> int:
        """Pictures of a split."""
        return sum(dataset.count(split) for dataset in self.datasets)

    def source(self, split: str, *fields: str) -> Source:
        """Random access to a split's pictures: some of `image`, `caption`, `index`."""
        return datasets.Joined([dataset.images(split, fields) for dataset in self.datasets])

    def training_images(self) -> Source | Mixture:
        """What an autoencoder is trained on: `image`."""
        data, buckets = self.study.data, self.caches.buckets
        return datasets.mixed(
            [
                dataset.images("train", ("image",), data.flip) if buckets is None
                else dataset.bucketed("train", buckets, self.caches.least, data.flip)
                for dataset in self.datasets
            ],
            data.weights,
        )

    def some(self, split: str, most: int) -> np.ndarray:
        """Numbers of at most so many of a split's pictures, ascending.

        Collections lie one after the other, each in the order of its files: of them they are evenly
        spaced. Composed pictures lie in no order: the first are as good.
        """
        count = self.count(split)
        index_N = np.arange(min(most, count))
        return index_N if self.study.data.composed else index_N * count // len(index_N)

    def groups(self, split: str, index_N: np.ndarray) -> np.ndarray:
        """What pictures of a split, by ascending numbers, have in common with others, see
        `datasets.Dataset`."""
        found, start = [], 0
        for number, dataset in enumerate(self.datasets):
            stop = start + dataset.count(split)
            own = index_N[(start <= index_N) & (index_N < stop)] - start
            several = f"{number} " if len(self.datasets) > 1 else ""
            found += [f"{several}{group}" for group in dataset.groups(split, own)]
            start = stop
        return np.asarray(found)

    @functools.cached_property
    def caches(self) -> caches.Caches:
        """The latents and text states. Where some are missing, all processes must ask for them:
        each makes its share."""
        if self.own is not self:
            return self.own.caches
        data, study = self.study.data, self.study

        def step() -> int:
            halves = math.lcm(*(self.networks.spec(m).downsampling for m in study.members))
            return self.networks.decoder_spec.downsampling * halves

        return caches.Caches(
            folder=epath.Path(data.cache).expanduser() if data.cache else self.workdir.path,
            shared=bool(data.cache), data=data, datasets=self.datasets,
            autoencoder=lambda: self.networks.autoencoder(), text=lambda: self.text_states,
            embedder=lambda: self.text_encoder, mesh=self.mesh, step=step,
            least=max(study.train.batch_size, study.autoencoder.train.batch_size),
            process_index=jax.process_index(), process_count=jax.process_count(),
        )

    @functools.cached_property
    def text_encoder(self) -> text_encoder.TextEncoder:
        """What sentences are scored by, whatever the networks' states are made by."""
        return text_encoder.load(self.study.data.text_length)

    @functools.cached_property
    def text_states(self) -> encoders.TextStates:
        """The frozen encoder whose states train networks."""
        if self.own is not self:
            return self.own.text_states
        data = self.study.data
        if not data.text_weights:
            return encoders.text_states(self.text_encoder, text_encoder.NAME)
        return encoders.text_encoder_from(data.text_weights, data.text_length)

    def states(self, texts: Sequence[str]) -> np.ndarray:
        """Text states of captions for the networks, (P, L, D), as exact as they are kept."""
        return self.networks.states(texts).astype(self.networks.states_dtype)

    def _contexts(self, captions: tuple[str, ...]) -> np.ndarray:
        """Text states by published networks' own encoder, (N, L, D), kept in the workdir."""
        hash = files.sha256_of([self.networks.text_hash(), captions])
        path = self.workdir / "data" / f"context_{hash}.array_record"
        with processes.lead_first("contexts"):
            if not path.exists():
                cache.write(path, cache.rows(self._context_batches(captions)), {"hash": hash})
        return cache.CacheSource(path, hash).batch(range(len(captions)))["context"]

    def _context_batches(self, captions: tuple[str, ...]) -> Iterator[dict[str, np.ndarray]]:
        with files.progress(len(captions), "text states", "caption") as bar:
            for index in _slices(len(captions), 64):
                yield {"context": self.states([captions[i] for i in index])}
                bar.update(len(index))

    # Devices.

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """The device mesh of the config; where these are a process's own, of its devices, with as
        many of its shards as they can hold."""
        mesh = self.study.mesh
        if not self.alone:
            return mesh_lib.make(mesh.data, mesh.fsdp, mesh.tensor, mesh.slices)
        return mesh_lib.own(mesh.fsdp, jax.local_devices())

    # Networks.

    @functools.cached_property
    def networks(self) -> networks_lib.Networks:
        """What draws pictures: the networks that the study trains, or published ones."""
        if self.study.weights:
            return published.networks(self.study, self.workdir, self.mesh)
        if self.study.finetune.pretrained:
            return dataclasses.replace(self.pretrained, alone=self.alone).networks
        return networks_lib.trained(self)

    def require_trained(self, members: Iterable[str] | None = None) -> None:
        """Raises `UserError` naming the first network, of all runs of all members or of these, that
        is not trained."""
        self.networks.require(self.study.trained if members is None else members)

    @functools.cached_property
    def pretrained(self) -> Materials:
        """Of the study whose members are fine-tuned here, see `config.FineTune`; on the devices of
        this one, which may be others than they were trained on."""
        workdir = Workdir(self.study.finetune.pretrained)
        # What is made of members further begins with their `ema`, see `config.Study.average`.
        study = dataclasses.replace(workdir.last_config(), mesh=self.study.mesh, average="")
        return Materials(study, workdir)

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

    @functools.cached_property
    def latent_scale(self) -> float:
        """1 / the deviation of the training latents. The workdir keeps it, so that who draws needs
        the networks alone; several processes ask the caches, as all of them must."""
        if processes.several():
            return self.caches.statistics.scale
        path = self.workdir / LATENT_SCALE
        encoder = pretrained.hash_of(self.networks.decoder()["encoder"])
        scale = _kept_scale(path, encoder)
        if scale is None:
            scale = self.caches.statistics.scale
            kept = {"encoder": encoder, "scale": scale}
            files.write_json(path, kept)
        return scale

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

    def spec(self, member: str) -> backbone.Spec:
        """A member's network. Raises `UserError` when it does not take these latents."""
        spec = self.networks.spec(member)
        if spec.latent_shape != self.latent_shape:
            raise UserError(
                f"member {member} takes latents of {spec.latent_shape}, but data.side="
                f"{self.study.data.side} and this autoencoder make {self.latent_shape}: change "
                "data.side, the autoencoder's levels or the members"
            )
        fitting.tokens(spec, f"member {member}", self.study.data.text_length)
        return spec

    def cost(self, spec: backbone.Spec) -> cost.Cost:
        """Of a network, a member's or one made of it, on captions as long as it is given here."""
        return cost.of(spec, self.networks.tokens)

    @functools.cache  # noqa: B019
    def drawer(self, member: str) -> Drawer:
        """What draws pictures with a member's network; compiled once for every stage."""
        return self.drawer_of(self.spec(member), self.study.train, self.study.sweep.batch_size)

    def drawer_of(
        self, spec: backbone.Spec, run: Train, count: int, frozen: Frozen | None = None,
        diffusion: Diffusion | None = None,
    ) -> Drawer:
        """What draws with a network, compiled as its run says.

        Args:
          spec: the network.
          run: its settings.
          count: pictures at a time, or a few more: these are split over all devices.
          frozen, diffusion: the study's own, if not given.
        """
        # Pictures along the way are drawn by all processes together: lanes for all their devices.
        return Drawer(
            spec, frozen or self.frozen, diffusion or self.study.diffusion,
            mesh_lib.rounded(count, self.mesh), self.decode, self.mesh, run.compute_dtype,
            run.attention,
        )

    def member_params(self, member: str) -> Any:
        """A member's parameters, averaged over its training: see `config.Study.average`."""
        return self.networks.params(member)

    @functools.cached_property
    def validation(self) -> dict[str, np.ndarray]:
        """The fixed part of the validation split that validation losses are computed on."""
        index = self.some("validation", VALIDATION_EXAMPLES)
        return {
            "mean": self.caches.posteriors("validation").batch(index)["mean"],
            "context": self.caches.first_states("validation").batch(index)["context"],
            "index": index.astype(np.int32),
        }

    # Metrics.

    @functools.cached_property
    def feature_network(self) -> efficientnet.FeatureNetwork:
        """The pretrained network whose features are compared."""
        return efficientnet.load(self.study.sweep.feature_side)

    @functools.cached_property
    def published_metrics(self) -> Published | None:
        """What `sweep.metrics` names, held against all validation pictures; the lead makes their
        statistics. None where it names nothing."""
        if not self.study.sweep.metrics:
            return None
        if self.own is not self:
            return self.own.published_metrics
        with processes.lead_first("published reference"):
            return published_scorer.load(
                self.study.sweep.metrics, self.workdir / REFERENCE,
                lambda: batches(self.source("validation", "image"), "real pictures"),
            )

    @functools.cached_property
    def scorer(self) -> Scorer | WithPublished:
        """What scores pictures of captions, see `_own_scorer`, and `published_metrics` beside."""
        own, beside = self._own_scorer(), self.published_metrics
        return WithPublished(own, beside) if beside else own

    @property
    def has_reference(self) -> bool:
        """Whether what `scorer` holds pictures against is kept, so that it makes none."""
        names, folder = self.study.sweep.metrics, self.own.workdir / REFERENCE
        return all(path.exists() for path in self._reference_paths) and (
            published_scorer.kept(names, folder))

    @property
    def _reference_paths(self) -> tuple[epath.Path, epath.Path]:
        folder = self.workdir / REFERENCE
        return folder / "validation.npz", folder / "probe.npz"

    def _own_scorer(self) -> Scorer:
        """Reference statistics of all validation pictures, and the probe of the training ones.
        The lead makes them: text states must be there."""
        network = self.feature_network
        extractor = network.layer_hash(LAYER)

        def features(images):
            return network.features(images)[LAYER]

        reference_path, probe_path = self._reference_paths
        with processes.lead_first("reference"):
            if not (reference_path.exists() and probe_path.exists()):
                self._make_reference(features, extractor, reference_path, probe_path)
        return Scorer(
            features=features,
            reference=ReferenceStats(moments.load(reference_path, extractor), extractor),
            probe=agreement.load(probe_path),
            replicates=self.study.sweep.replicates,
        )

    def _make_reference(
        self, features: Callable, extractor: str, reference_path: epath.Path,
        probe_path: epath.Path,
    ) -> None:
        index = {
            "train": self.some("train", PROBE_PICTURES),
            "validation": np.arange(self.count("validation")),
        }
        # Text states are kept where they are made here, features are not.
        embeddings = {split: self._embeddings(split, index[split]) for split in SPLITS}
        real = {split: self._real_features(split, index[split], features) for split in SPLITS}
        groups = self.groups("train", index["train"])
        probe = agreement.fit(
            real["train"], embeddings["train"], groups_N=groups, extractor=extractor,
            encoder=self.text_encoder.hash,
        )
        sanity = agreement.sanity(probe, real["validation"], embeddings["validation"])
        log.info("caption probe on real validation pairs: %s", sanity)
        files.atomic_write_text(
            self.workdir / SANITY, json.dumps(dataclasses.asdict(sanity), indent=1)
        )
        agreement.save(probe_path, probe)
        moments.save(reference_path, moments.Moments.of(real["validation"]), extractor)

    def _real_features(self, split: str, index_N: np.ndarray, features) -> np.ndarray:
        images, what = self.source(split, "image"), f"features of real pictures, {split}"
        return np.concatenate([features(some) for some in batches(images, what, index_N)])

    def _embeddings(self, split: str, index_N: np.ndarray) -> np.ndarray:
        # A part at a time: the states beside them are hundreds of times larger.
        states, parts = self.caches.first_states(split), _slices(len(index_N), 1024)
        return np.concatenate([states.batch(index_N[part])["embedding"] for part in parts])

    def captions(self, block: int) -> tuple[np.ndarray, tuple[str, ...]]:
        """The validation pictures that a seed block takes, (N,), and a caption of each."""
        index = block_indices(
            block, self.study.sweep.num_images, self.count("validation"), self.study.data.seed
        )
        found = self.source("validation", "caption").batch(index)["caption"]
        return index, tuple(found.tolist())

    @functools.cache  # noqa: B019
    def prompts(self, block: int) -> Prompts:
        """A seed block's captions, with what they are drawn and scored by."""
        index, captions = self.captions(block)
        rows = self.caches.first_states("validation").batch(index)
        own = self.networks.text_hash is None
        return Prompts(
            index_N=index.astype(np.int32),
            context_NLD=rows["context"] if own else self._contexts(captions),
            embeddings_NE=rows["embedding"],
            captions=captions,
        )

    @functools.cache  # noqa: B019
    def swept_prompts(self, block: int) -> Prompts:
        """A seed block's captions as a sweep scores them: by published networks too."""
        own, beside = self.prompts(block), self.published_metrics
        if not beside:
            return own
        both_NE = np.concatenate([own.embeddings_NE, beside.embeddings(own.captions)], axis=1)
        return dataclasses.replace(own, embeddings_NE=both_NE)

    def shown(self) -> np.ndarray:
        """Some validation pictures, uint8."""
        index_N = self.some("validation", SHOWN_EXAMPLES)
        return self.source("validation", "image").batch(index_N)["image"]


def _kept_scale(path: epath.Path, encoder: str) -> float | None:
    """The scale that a workdir keeps of this encoder; None where it keeps none that can be read."""
    if not path.exists():
        return None
    try:
        kept = json.loads(path.read_text())
        scale = kept["scale"] if kept["encoder"] == encoder else None
        if scale is None or (math.isfinite(scale) and scale > 0):
            return scale
        raise ValueError(f"scale is {scale}")
    except (ValueError, TypeError, KeyError) as e:
        log.warning("%s is damaged (%s) and made anew", path, e)
        return None


def batches(
    source: Any, what: str, index_N: np.ndarray | None = None, size: int = 256
) -> Iterator[np.ndarray]:
    """A source's pictures, or those of an index, uint8 (B, H, W, 3), with a progress bar."""
    index_N = np.arange(len(source)) if index_N is None else index_N
    with files.progress(len(index_N), what, "picture") as bar:
        for part in _slices(len(index_N), size):
            yield source.batch(index_N[part])["image"]
            bar.update(len(part))


def _slices(total: int, size: int):
    for start in range(0, total, size):
        yield range(start, min(start + size, total))
