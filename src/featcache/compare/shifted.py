"""`--test-shifted`: a second test set from other conditions, on which both ways are scored too.

Fine-tuning can win on images like those of train and lose elsewhere (arXiv:2202.10054).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from featcache.cache import FeatureCache
from featcache.compare.alternatives import Network
from featcache.compare.extraction import extract_configs
from featcache.config import CompareConfig, JsonObject, TrainHeadConfig
from featcache.data import BadImage, ImageDataset, ImageSplit, bad_image_error, load_test_folder
from featcache.display import say
from featcache.errors import UserError
from featcache.extract import extract
from featcache.extract.request import Request
from featcache.heads import load_head
from featcache.heads.scoring import open_test
from featcache.predict import Classifier
from featcache.results import RunReport
from featcache.results.metrics import wilson_interval


def shifted_images(config: CompareConfig, class_names: list[str]) -> ImageDataset | None:
    """The second test set as a dataset with a test split alone; None if none is given.

    Args:
        config: The comparison's.
        class_names: Those of train.

    Raises:
        UserError: It is no folder of class folders, or has other classes.
    """
    if config.test_shifted is None:
        return None
    try:
        dataset = load_test_folder(config, config.test_shifted, class_names)
    except UserError as error:
        raise UserError(f"--test-shifted: {error}") from error
    for note in dataset.notes:
        say(note)
    return dataset


@dataclass(frozen=True, kw_only=True, eq=False)
class ShiftedTest:
    """The second test set, once as images and once as features of each network.

    Attributes:
        name: Of the dataset.
        split: Its images, without those that could not be read.
        caches: Its features; their rows are those images.
        num_in_train: Images that are among those of train.
    """

    name: str
    split: ImageSplit
    caches: dict[Network, FeatureCache]
    num_in_train: int

    @classmethod
    def cached(
        cls,
        config: CompareConfig,
        dataset: ImageDataset,
        home: ImageDataset,
        networks: Sequence[Network],
    ) -> Self:
        """Cache the features of the second test set.

        Args:
            config: The comparison's.
            dataset: From `shifted_images`.
            home: The comparison's own images.
            networks: Those that features of `home` were made with.

        Raises:
            UserError: An image is unreadable under `on_error="fail"`.
        """
        say(f"caching the second test set, {len(dataset.splits['test']):,} images")
        asked = extract_configs(config)
        caches = {}
        for network in networks:
            # The weights are those of train's features: nothing is estimated on these images.
            same = Request.of(asked[network], home).config
            wanted = dataclasses.replace(
                same,
                dataset=str(config.test_shifted),
                batchnorm="frozen",
                num_train=None,
                num_test=None,
                test_fraction=None,
                group_from=None,
            )
            caches[network] = FeatureCache(extract(wanted, dataset)["cache"])
        first = next(iter(caches.values()))
        rows = first.split("test").rows
        split = dataset.splits["test"].subset(rows)
        content = first.rows("test").content[rows]
        split.record(content)
        in_train = np.isin(content.view("S32"), home.splits["train"].content.view("S32"))
        return cls(name=dataset.name, split=split, caches=caches, num_in_train=int(in_train.sum()))

    @property
    def digest(self) -> str:
        """Identifies images and features."""
        return next(iter(self.caches.values())).digest.hex()

    def describe(self) -> JsonObject:
        """For the comparison's report."""
        paths = {network: str(cache.path) for network, cache in self.caches.items()}
        return {"dataset": self.name, "num_images": len(self.split), "caches": paths}

    def score_head(self, report: RunReport) -> JsonObject:
        """Scores of the head that `train_best_head` wrote, for its report."""
        cache = self.caches[report.more["network"]]
        test = open_test(TrainHeadConfig(cache=cache.path), cache, in_memory=True)
        predicted = test.predict(load_head(Path(report.more["head"])))
        return self._scores(predicted.classes.tolist())

    def score_model(self, path: Path, config: CompareConfig) -> JsonObject:
        """Scores of a fine-tuned model, for its report."""
        classifier = Classifier.load(path, device=config.device, workers=config.workers)
        predicted = []
        for index, row in classifier.stream(self.split):
            if isinstance(row, BadImage):
                raise bad_image_error(self.split, index, row)
            predicted.append(int(row.argmax()))
        return self._scores(predicted)

    def _scores(self, predicted: Sequence[int]) -> JsonObject:
        labels = self.split.labels.tolist()
        right = sum(a == b for a, b in zip(labels, predicted, strict=True))
        return {
            "dataset": self.name,
            "num_test": len(labels),
            "test_top1": right / len(labels),
            "test_interval": wilson_interval(right, len(labels)),
            "labels": labels,
            "predicted": list(predicted),
        }
