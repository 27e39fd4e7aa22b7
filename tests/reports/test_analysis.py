"""What follows from predictions, against plain counting, torchmetrics and a search on a grid."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.classification import MulticlassCalibrationError, MulticlassConfusionMatrix

from timm_dfpt.reports.analysis import agreement, class_counts, confusion_matrix, confusions, groups
from timm_dfpt.reports.calibration import BINS, calibrate, fit_temperature, reliability
from timm_dfpt.reports.predictions import (
    MAX_LOGITS,
    PredictionRecorder,
    SplitPredictions,
    read_predictions,
    write_predictions,
)  # fmt: skip
from timm_dfpt.tasks.evaluation import evaluate_together

CLASSES, IMAGES = 7, 400


def logits_and_target(seed, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(CLASSES, (IMAGES,), generator=generator)
    logits = torch.randn(IMAGES, CLASSES, generator=generator)
    return scale * (logits + 1.5 * F.one_hot(target, CLASSES)), target


def test_logits_of_any_size_are_kept(tmp_path):
    logits = torch.tensor([[0.0, 3e5], [2e6, -2e6]])
    recorder = PredictionRecorder(2)
    recorder.start('val', 2)([{'student': logits}], torch.tensor([1, 0]), torch.arange(2))
    write_predictions(tmp_path / 'file', recorder.result({(0, 'student'): 'student'}), {})
    said = read_predictions(tmp_path / 'file')[0]['val'].models['student']
    assert said.logits.float().softmax(1).equal(logits.softmax(1))


@pytest.fixture(scope='module')
def split():
    """Two models, in batches, the rows in another order than they are numbered."""
    (student, target), (teacher, _) = logits_and_target(0), logits_and_target(1)
    recorder = PredictionRecorder(CLASSES)
    observe = recorder.start('val', IMAGES)
    for rows in torch.randperm(IMAGES, generator=torch.Generator().manual_seed(2)).split(64):
        outputs = {'student': student[rows], 'teacher': teacher[rows], 'of other classes': torch.zeros(len(rows), 3)}
        observe([outputs], target[rows], rows)
    names = {(0, name): name for name in outputs} | {(1, 'student'): 'nobody'}
    return student, teacher, target, recorder.result(names)['val']


def test_predictions_are_those_of_the_logits(split, tmp_path):
    student, _, target, noted = split
    write_predictions(tmp_path / 'file', {'val': noted}, {3: b'jpeg', 12: b'another'})
    splits, images = read_predictions(tmp_path / 'file')
    assert images == {3: b'jpeg', 12: b'another'}
    for found in (noted, splits['val']):
        assert set(found.models) == {'student', 'teacher'}
        assert found.target.equal(target)
        said = found.models['student']
        assert said.classes.equal(student.argmax(dim=1))
        torch.testing.assert_close(said.confidence, student.softmax(dim=1).amax(dim=1))
        torch.testing.assert_close(said.logits.softmax(1), student.softmax(1), atol=2e-3, rtol=0)


def test_logits_are_bounded_and_the_pass_is_whole():
    classes = MAX_LOGITS // 50
    recorder = PredictionRecorder(classes)
    observe = recorder.start('val', 80)
    logits, target = torch.randn(80, classes), torch.arange(80) % 2
    for rows in torch.arange(60).split(20):
        observe([{'student': logits[rows]}], target[rows], rows)
    names = {(0, 'student'): 'student'}
    assert recorder.result(names) == {}
    observe([{'student': logits[60:]}], target[60:], torch.arange(60, 80))
    found = recorder.result(names)['val']
    assert len(found) == 80
    assert len(found.sample) == 50
    # Images are often sorted: the kept ones must not be the first.
    assert found.sample.max() > 60
    assert found.sampled_target.equal(target[found.sample])
    expected = logits[found.sample].log_softmax(1)
    torch.testing.assert_close(found.models['student'].logits.log_softmax(1), expected, atol=2e-2, rtol=0)


def test_the_evaluation_says_what_it_measures(make_accelerator):
    student, target = logits_and_target(0)
    recorder = PredictionRecorder(CLASSES)
    batches = [(student[rows], target[rows], rows) for rows in torch.arange(IMAGES).split(96)]
    measured = evaluate_together(
        [lambda logits, _: {'student': logits}], batches, make_accelerator(), None, recorder.start('val', IMAGES)
    )
    found = recorder.result({(0, 'student'): 'student'})['val']
    share = 100 * (found.models['student'].classes == found.target).double().mean()
    assert measured[0]['student']['top1'] == pytest.approx(float(share))
    assert measured[0]['student']['confidence'] == pytest.approx(float(found.models['student'].confidence.mean()))


def test_counts(split):
    student, teacher, target, noted = split
    said, other = student.argmax(1), teacher.argmax(1)
    counts = class_counts(noted, CLASSES)
    for label in range(CLASSES):
        of_class = target == label
        assert counts.images[label] == of_class.sum()
        assert counts.accuracy('student')[label] == pytest.approx(100 * float((said[of_class] == label).float().mean()))
    matrix = confusion_matrix(noted.models['student'], target, CLASSES)
    assert matrix.equal(MulticlassConfusionMatrix(CLASSES)(said, target))
    found = confusions(noted.models['student'], target, CLASSES)
    assert {(c.target, c.predicted): c.count for c in found} == {
        (a, b): int(matrix[a, b]) for a in range(CLASSES) for b in range(CLASSES) if a != b and matrix[a, b]
    }
    assert [c.count for c in found] == sorted((c.count for c in found), reverse=True)
    parts = agreement(noted, 'student', 'teacher')
    right, also, same = said == target, other == target, said == other
    assert parts == {
        'both_right': int((right & also).sum()), 'only_model': int((right & ~also).sum()),
        'only_other': int((~right & also).sum()), 'same_mistake': int((same & ~right).sum()),
        'other_mistakes': int((~same & ~right & ~also).sum()),
    }  # fmt: skip
    assert sum(parts.values()) == IMAGES


def test_images_are_those_that_the_title_names(split):
    student, teacher, target, noted = split
    confidence, said = student.softmax(1).max(1)
    other = teacher.argmax(1)
    found = {group.title: group for group in groups(noted, 'student', 'teacher', 5)}
    tests = {
        'student wrong, teacher right': (said != target) & (other == target),
        'student and teacher wrong': (said != target) & (other != target),
        'student right, teacher wrong': (said == target) & (other != target),
    }
    for title, mask in tests.items():
        assert found[title].count == mask.sum()
        assert mask[found[title].rows].all()
        assert confidence[found[title].rows].tolist() == sorted(confidence[mask].tolist(), reverse=True)[:5]
    assert confidence[found['student most sure'].rows[0]] == confidence.max()
    assert confidence[found['student least sure'].rows[0]] == confidence.min()
    unlabelled = SplitPredictions(None, noted.sample, noted.models)
    titles = [group.title for group in groups(unlabelled, 'student', 'teacher', 5)]
    assert titles == ['student and teacher differ', 'student most sure', 'student least sure']
    assert groups(noted, 'student', None, 5)[0].title == 'student wrong'


@pytest.mark.parametrize('scale', [0.3, 3.0])
def test_the_calibration_error_is_that_of_torchmetrics(scale):
    logits, target = logits_and_target(4, scale)
    confidence, said = logits.softmax(1).max(1)
    # A confidence of exactly 1 has a bin of its own there.
    assert confidence.max() < 1
    expected = MulticlassCalibrationError(CLASSES, n_bins=BINS, norm='l1')(logits.softmax(1), target)
    assert reliability(confidence, said == target).error == pytest.approx(float(expected), abs=1e-6)


def test_certainty_is_in_the_last_bin():
    found = reliability(torch.tensor([1.0, 1.0, 0.99, 0.0]), torch.tensor([True, False, True, False]))
    assert found.counts.tolist() == [1, *[0] * (BINS - 2), 3]
    assert found.error == pytest.approx((3 * abs(2 / 3 - 2.99 / 3)) / 4)


def test_the_temperature_is_that_of_the_least_loss():
    logits, target = logits_and_target(5, 4.0)
    grid = np.exp(np.linspace(np.log(0.2), np.log(20), 4001))
    losses = [float(F.cross_entropy(logits.double() / t, target)) for t in grid]
    assert fit_temperature(logits, target) == pytest.approx(grid[int(np.argmin(losses))], rel=3e-3)
    # What is always right has no best temperature but the smallest.
    assert fit_temperature(F.one_hot(target, CLASSES).float(), target) == pytest.approx(0.01, rel=1e-3)


def test_it_is_measured_on_other_images_than_it_was_fitted_on(split):
    *_, noted = split
    halves = calibrate('student', noted, None)
    assert halves.images == IMAGES // 2
    whole = calibrate('student', noted, noted)
    assert whole.images == IMAGES
    assert whole.loss_after < whole.loss_before
    assert whole.after.error < whole.before.error
    target = noted.target[noted.sample]
    assert whole.temperature == pytest.approx(fit_temperature(noted.models['student'].logits, target))
    assert calibrate('student', SplitPredictions(None, noted.sample, noted.models), None) is None
