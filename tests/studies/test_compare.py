"""Overlap and cross-ablation: against scipy, against counting, and against an ablation done by hand."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ET

import pytest
import scipy.stats
import torch
from support.circuits_subject_cases import subject_over, switched_on_f
from support.models import VOCABULARY, planted_pairs, planted_sparse
from support.studies_result_cases import planted_result

from bridge.circuits.subject import masked_gate
from bridge.evidence.controls import random_deletions
from bridge.models.dense import DenseModel
from bridge.studies.compare import DRAWS, compare, geometric_mean, heat_map, mean_sizes, measure_overlap, render_comparison
from bridge.studies.result import Size
from bridge.verdicts.task_search import expected_overlap


def test_overlap_by_chance_is_hypergeometric() -> None:
    draws = random.Random(0)
    counts = [len(set(draws.sample(range(50), 12)) & set(draws.sample(range(50), 20))) for _ in range(4000)]
    assert expected_overlap(12, 20, 50) == scipy.stats.hypergeom(50, 12, 20).mean() == 4.8
    assert sum(counts) / len(counts) == pytest.approx(4.8, abs=0.1)
    one = measure_overlap("a", "b", "nodes", 8, (12, 20), 50)
    assert one.p == pytest.approx(sum(scipy.stats.hypergeom.pmf(k, 50, 12, 20) for k in range(8, 13)))
    assert one.p == pytest.approx(sum(count >= 8 for count in counts) / len(counts), abs=0.02)
    assert measure_overlap("a", "b", "nodes", 0, (12, 20), 50).p == pytest.approx(1)


def test_means_count_failed_tasks_at_full_size() -> None:
    assert geometric_mean([1, 100]) == pytest.approx(10) and geometric_mean([]) == 0 and geometric_mean([0]) == 1
    sizes = mean_sizes([Size(10, 100)], [Size(20, 1000)], 1, Size(1000, 10_000), Size(500, 100_000))
    assert (sizes.tasks, sizes.failed) == (2, 1)
    assert (sizes.sparse_nodes, sizes.sparse_edges) == (pytest.approx(100), pytest.approx(1000))
    assert (sizes.dense_nodes, sizes.dense_edges) == (pytest.approx(100), pytest.approx(10_000))
    assert mean_sizes([Size(1, 1)], [], 0, Size(2, 2), None).dense_edges is None


def test_cross_ablation_is_what_deleting_does(dense: DenseModel) -> None:
    corpus_bt = torch.randint(2, VOCABULARY, (12, 12), generator=torch.Generator().manual_seed(5))
    subject = subject_over(planted_sparse(dense), corpus_bt)
    one, other = planted_result(subject, "one <&>"), planted_result(subject, "other", neurons=(0,))
    prompts = {"one <&>": planted_pairs(6).both_members(), "other": planted_pairs(6, seed=1)}
    comparison = compare(subject, [one, other], prompts)
    for a, result in enumerate((one, other)):
        gate = masked_gate(subject, ~subject.space.join(result.circuit.kept))
        for b, pairs in enumerate(prompts.values()):
            rise = pairs.loss(subject.logits(pairs, gate)).mean() - pairs.loss(subject.logits(pairs)).mean()
            assert comparison.rise[a][b] == pytest.approx(float(rise), abs=1e-6)
    # beside it: deletions of nodes that are on for some prompt of the tasks, as the judge's are
    on_f = torch.stack([switched_on_f(subject, pairs) for pairs in prompts.values()]).any(0)
    generator = torch.Generator().manual_seed(0)
    for a, result in enumerate((one, other)):
        drawn = random_deletions(subject.space, subject.space.join(result.circuit.kept), on_f, generator, DRAWS)
        for b, pairs in enumerate(prompts.values()):
            losses = [pairs.loss(subject.logits(pairs, masked_gate(subject, ~gone_f))).mean() for gone_f in drawn]
            rise = torch.stack(losses).mean() - pairs.loss(subject.logits(pairs)).mean()
            assert comparison.random[a][b] == pytest.approx(float(rise), abs=1e-6)
    share = comparison.share[0][1]
    assert share is not None and share == pytest.approx(comparison.rise[0][1] / comparison.rise[1][1])
    nodes = next(found for found in comparison.overlaps if found.what == "nodes")
    assert nodes.shared == len(set(one.circuit.nodes) & set(other.circuit.nodes)) == 3
    edges = next(found for found in comparison.overlaps if found.what == "edges")
    assert edges.shared == 2

    assert comparison.backbone is None  # half of two tasks is one
    third = compare(subject, [one, other, planted_result(subject, "third", neurons=(1,))], prompts | {"third": planted_pairs(4)})
    assert third.backbone is not None and third.backbone.nodes == 6 and "SHARED BACKBONE" in render_comparison(third)
    assert third.to_json()["backbone"]["mean_overlap"] == third.backbone.mean_overlap

    text = render_comparison(comparison)
    assert "CROSS-ABLATION" in text and "OVERLAP" in text
    image = ET.fromstring(heat_map(comparison))
    cells = [group.get("id") for group in image.iter("{http://www.w3.org/2000/svg}g") if "deleted" in group.get("id", "")]
    assert len(cells) == 4 and f"{comparison.rise[0][1]:+.2f}" in heat_map(comparison).replace("\N{MINUS SIGN}", "-")
    assert all(
        value.startswith(("#", "data:")) for one in image.iter() for key, value in one.items() if key.endswith("href")
    )  # self-contained
    assert comparison.to_json()["off_diagonal"] == comparison.mean_cross_effect
