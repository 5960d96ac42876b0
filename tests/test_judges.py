"""Judges: each score by an independent way, networks that are handed in, what cannot be judged."""

import inspect
import math
from dataclasses import replace

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model
from transformers.utils import logging

from causal_story.cartoon import CHARACTERS
from causal_story.data import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD, StoryRecord, pixels
from causal_story.judges import (
    METRICS,
    ClassifierJudge,
    ClipJudge,
    ImageEncoder,
    JudgeSettings,
    ReaderFinder,
    VisionJudge,
    VisionNetwork,
    WorldJudge,
    check_features,
    cmmd,
    copy_rate,
    count_matching,
    evaluate_stories,
    expected_characters,
    frames_right,
    in_range,
    inception_judges,
    kid,
    last_frame_copied,
    like_references,
    lone_characters,
    make_judges,
    mentions_right,
    print_scores,
    protocol_frames,
    read_network,
    read_references,
    same_across_frames,
    score,
    style_as_true,
    style_within,
    vision_network,
    world_truth,
)
from causal_story.metrics import frechet_distance
from causal_story.reader import FrameReader, frames_tensor
from causal_story.storyworld import make_stories
from causal_story.words import tiny_tokenizers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit"),
    pytest.mark.filterwarnings("ignore:.*too few for"),
]
STORIES = [make_stories(1, "test", seed=k, n_frames=3 + 2 * (k % 2))[0] for k in range(4)]
RECORDS = [
    StoryRecord(str(k), story.captions, story.frames(size=64), story.truth())
    for k, story in enumerate(STORIES)
]


@pytest.fixture(autouse=True)
def no_bars():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def reader():
    return FrameReader.from_pretrained("miniature")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bools(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) > 0.5


def small(frames):
    "A network that stands for any other: an 8x8 picture, as one row."
    return pixels(frames, 8)


VISION = VisionNetwork("small picture", lambda pictures: pictures.flatten(1), small)


class Drawn:
    "Drawn stories as an evaluation wants them: here the truth, changed by a function."

    def __init__(self, change=lambda frames: frames):
        self.change = change
        self.paths = dict.fromkeys(range(len(RECORDS)))

    def frames(self, number, record, task):
        return self.change(record.frames[int(task == "continuation") :])


class Dataset:
    path = "stories.h5"
    split = "test"

    def __len__(self):
        return len(RECORDS)

    def story(self, number, tile):
        assert tile == 0
        return RECORDS[number]


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("key", METRICS)
def test_an_entry_needs_what_its_function_takes_and_names_its_source(key):
    metric = METRICS[key]
    parameters = inspect.signature(metric.function).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty]
    assert sorted(required) == sorted(metric.needs)
    assert metric.source and metric.better in ("higher", "lower", "as true")
    assert [other.title for other in METRICS.values()].count(metric.title) == 1


def test_a_new_score_is_one_entry(monkeypatch):
    from causal_story.judges import Metric

    brightness = Metric("brightness", ("drawn",), lambda drawn: drawn.mean(-1).tolist())
    monkeypatch.setitem(METRICS, "brightness", brightness)
    (line,) = score([dict(judge="me", drawn=torch.ones(3, 2))], ["brightness"])
    assert (line["name"], line["value"], line["n"]) == ("brightness (me)", 1.0, 3)


def test_only_what_the_notes_suffice_for_is_scored():
    notes = [dict(judge="me", seen=bools(5, 3), present=bools(5, 3, seed=1)) for _ in range(2)]
    assert [line["metric"] for line in score(notes)] == ["f1", "frame", "count"]
    assert [line["metric"] for line in score(notes, ("count", "kid"))] == ["count"]


def test_nothing_to_count_gives_no_line():
    nobody = torch.zeros(2, 3, dtype=torch.bool)
    assert score([dict(judge="me", seen=nobody, present=nobody)], ["f1"]) == []
    one = dict(judge="me", real=normal(1, 2), drawn=normal(1, 2))
    assert score([one], ["frechet", "kid", "cmmd"]) == []


def test_stories_that_were_judged_differently_are_not_mixed():
    notes = [dict(judge=judge, seen=bools(2, 2), present=bools(2, 2)) for judge in ("a", "b")]
    with pytest.raises(ValueError, match=r"not judged alike \(1 by a; 1 by b\)"):
        score(notes)


def test_a_distance_with_too_few_frames_carries_the_words(capsys):
    notes = [dict(judge="me", real=normal(3, 8), drawn=normal(3, 8, seed=1)) for _ in range(2)]
    lines = {line["metric"]: line for line in score(notes)}
    assert "6 frames are too few for 8 features" in lines["frechet"]["note"]
    assert "note" not in lines["kid"] and lines["kid"]["n"] == 6
    print_scores(list(lines.values()))
    out = capsys.readouterr().out
    assert "n = 6 frames\n    6 frames are too few" in out


# ---------------------------------------------------------------- distances


def test_kid_is_unbiased_and_a_frechet_distance_is_not():
    kids, frechets = [], []
    for seed in range(60):
        a, b = normal(2, 30, 4, seed=seed)
        kids.append(kid(a, b))
        frechets.append(frechet_distance(a, b))
    error = numpy.std(kids) / len(kids) ** 0.5
    assert abs(numpy.mean(kids)) < 3 * error
    assert min(frechets) > 0


def test_kid_agrees_with_its_definition():
    a, b = normal(40, 6).double(), normal(40, 6, seed=1).double() + 0.3

    def kernel(x, y):
        return (x @ y.T / 6 + 1) ** 3

    within = sum(kernel(x, x).sum() - kernel(x, x).diagonal().sum() for x in (a, b)) / (40 * 39)
    assert kid(a, b) == pytest.approx(float(within - 2 * kernel(a, b).mean()), rel=1e-9)


def test_kid_of_many_frames_takes_subsets_by_its_seed_and_leaves_the_generator_alone():
    a, b = normal(1100, 3), normal(1050, 3, seed=1)
    state = torch.get_rng_state()
    first = kid(a, b, subsets=2)
    assert torch.equal(state, torch.get_rng_state())
    assert kid(a, b, subsets=2) == first != kid(a, b, subsets=2, seed=1)


def test_cmmd_agrees_with_its_definition_and_not_on_the_length_of_features():
    a, b = normal(1203, 5), normal(700, 5, seed=1) + 0.4
    x, y = functional.normalize(a.double(), dim=-1), functional.normalize(b.double(), dim=-1)

    def kernel(p, q):
        return (-(torch.cdist(p, q) ** 2) / 200).exp().mean()

    expected = 1000 * float(kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert cmmd(a, b) == pytest.approx(expected, rel=1e-4)
    assert cmmd(3 * a, b) == pytest.approx(cmmd(a, b), rel=1e-4)
    assert cmmd(a, a) == pytest.approx(0, abs=1e-6)


def test_protocols():
    frames = frames_tensor(STORIES[0].frames(128))
    arldm, standard = protocol_frames(frames, "arldm"), protocol_frames(frames, "standard")
    assert arldm.shape == standard.shape == (len(frames), 3, 299, 299)

    def sharpest(pictures):
        return (pictures[..., 1:] - pictures[..., :-1]).abs().max()

    assert sharpest(arldm) < sharpest(standard)
    with pytest.raises(ValueError, match="protocol"):
        protocol_frames(frames, "fid")


# ---------------------------------------------------------------- characters


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10**6))
def test_f1_and_frame_accuracy_agree_with_counting(n, seed):
    seen, present = bools(2, n, 6, seed=seed)
    hits = int((seen & present).sum())
    misses = int((seen != present).sum())
    verdicts = mentions_right(seen, present)
    if hits + misses:
        assert numpy.mean(verdicts) == pytest.approx(2 * hits / (2 * hits + misses))
    whole = [a.tolist() == b.tolist() for a, b in zip(seen, present)]
    assert frames_right(seen, present) == whole


def test_shapes_must_agree():
    with pytest.raises(IndexError):
        mentions_right(bools(3, 6), bools(1, 6))


@pytest.mark.parametrize(
    "seen, present, value",
    [
        ([1, 1, 0], [0, 1, 1], 1),  # two for two, whoever they are
        ([1, 1, 1], [1, 0, 0], math.exp(-2)),
        ([0, 0, 0], [1, 1, 0], math.exp(-1)),
        ([0, 0, 0], [0, 0, 0], 1),
        ([1, 0, 0], [0, 0, 0], 0),
    ],
)
def test_head_counts(seen, present, value):
    counted = count_matching(torch.tensor([seen]).bool(), torch.tensor([present]).bool())
    assert counted == [pytest.approx(value, abs=1e-5)]


def test_similarity_of_characters_by_loops():
    features = list(normal(4, 5))
    figures = dict(Milo=[features[0], None, features[1]], Kiki=[features[2]], Luna=[None])

    def cosine(a, b):
        return float(a @ b / a.norm() / b.norm())

    assert same_across_frames(figures) == [pytest.approx(cosine(*features[:2]), abs=1e-6)]
    references = dict(Milo=torch.stack(features[2:4]))
    to_milo = [(cosine(milo, features[2]) + cosine(milo, features[3])) / 2 for milo in features[:2]]
    values = like_references(figures, references)
    assert values == [pytest.approx(to_milo[0]), 0.0, pytest.approx(to_milo[1])]


def test_style_by_loops():
    drawn, real = normal(3, 4), normal(3, 4, seed=1)
    pairs = [functional.cosine_similarity(drawn[i], drawn[j], dim=0) for i, j in ((0, 1), (0, 2))]
    pairs.append(functional.cosine_similarity(drawn[1], drawn[2], dim=0))
    assert style_within(drawn) == [pytest.approx(float(sum(pairs) / 3), abs=1e-6)]
    assert style_within(drawn[:1]) == []
    assert style_as_true(real, real) == [pytest.approx(1)] * 3


# ---------------------------------------------------------------- copying


def test_copy_rate_is_one_for_a_copy_and_half_for_indifference():
    shown, other = torch.eye(2)
    between = torch.ones(2)
    rates = copy_rate(torch.stack([shown, between, other]), torch.stack([shown, other]))
    assert rates.tolist() == pytest.approx([1, 0.5, 0], abs=1e-6)


def test_copying_the_last_frame_and_the_given_frame():
    real = functional.normalize(normal(4, 16), dim=-1)
    still = real[:1].expand(4, 16)
    assert last_frame_copied(still, real, still[:-1]) == pytest.approx([1, 1, 1], abs=1e-4)
    assert last_frame_copied(real, real, real[:-1]) == pytest.approx([0, 0, 0], abs=1e-4)
    given = torch.cat([real[:1], real[:1], real[1:3]])  # continuation: before each of real[1:]...
    assert len(last_frame_copied(real[1:], real[1:], given[:3])) == 3
    assert last_frame_copied(real[:1], real[:1], real[:0]) == []


def test_copies_of_a_reference_are_found():
    sheet = dict(Milo=torch.eye(3)[:2], Kiki=torch.eye(3)[2:])
    figures = dict(Milo=[torch.eye(3)[0], None], Kiki=[torch.eye(3)[2]])
    notes = [dict(judge="me", figures=figures, sheet=sheet, references=sheet)]
    lines = {line["metric"]: line for line in score(notes)}
    assert lines["reference copy"]["value"] == pytest.approx(1)
    assert lines["reference copy"]["n"] == 1  # one picture of Kiki: nothing to compare with


# ---------------------------------------------------------------- networks that are handed in


def test_class_probabilities_are_refused_and_classes_of_imagenet_are_doubted():
    with pytest.raises(ValueError, match="inception: the network answers with class prob"):
        check_features(normal(4, 10).softmax(-1), "inception")
    check_features(normal(4, 10).relu(), "inception")
    check_features(torch.ones(4, 1), "inception")
    with pytest.warns(UserWarning, match="1000 outputs look like the classes of ImageNet"):
        check_features(normal(4, 1000), "inception")


def test_a_classifier_with_probabilities_is_refused_unless_it_says_so():
    def probabilities(pictures):
        return torch.sigmoid(4 * pictures.mean((2, 3)))

    with pytest.raises(ValueError, match="probabilities"):
        ClassifierJudge(probabilities, 16).look(RECORDS[0], RECORDS[0].frames)
    said_so = ClassifierJudge(probabilities, 16, threshold=0.5)
    logits = ClassifierJudge(lambda pictures: 4 * pictures.mean((2, 3)), 16)
    for judge in (said_so, logits):
        judge.notes = judge.look(RECORDS[0], RECORDS[0].frames)
    assert torch.equal(said_so.notes["seen"], logits.notes["seen"])


def test_pixel_values_reach_the_network_in_its_range():
    assert in_range(torch.tensor([-1.0, 0.0, 1.0]), (0, 255)).tolist() == [0, 127.5, 255]

    def mean_colour(pictures):
        return pictures.mean((2, 3))

    distances = []
    for value_range in ((-1, 1), (0, 255)):
        judge = inception_judges(mean_colour, value_range)[0]
        notes = [judge.look(record, RECORDS[1].frames) for record in RECORDS]
        distances.append(score(notes, ["frechet"])[0]["value"])
    assert distances[1] == pytest.approx(distances[0] * 127.5**2, rel=1e-4)


def test_networks_from_files(tmp_path):
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    torch.jit.script(pool).save(str(tmp_path / "pool.pt"))
    network = vision_network(tmp_path / "pool.pt", "vision", size=32, value_range=(0, 255))
    features = network(RECORDS[0].frames)
    expected = pool((pixels(RECORDS[0].frames, 32) + 1) * 127.5)
    torch.testing.assert_close(features, expected)
    assert network.name == "vision pool.pt"
    with pytest.raises(FileNotFoundError, match="vision.*nowhere.pt"):
        vision_network(tmp_path / "nowhere.pt")
    (tmp_path / "bad.pt").write_bytes(b"no network")
    with pytest.raises(ValueError, match="inception.*not a TorchScript file"):
        read_network(tmp_path / "bad.pt", "inception")


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    Dinov2Model(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "BitImageProcessor", "do_resize": true, "do_rescale": true, '
        '"size": {"shortest_edge": 32}, "do_center_crop": true, "do_normalize": true, '
        '"crop_size": {"height": 28, "width": 28}, "rescale_factor": 0.00392156862745098, '
        '"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}'
    )
    return folder


def test_a_vision_model_from_a_folder_is_prepared_by_its_own_processor(dino):
    network = vision_network(dino, "vision")
    assert network.prepare(RECORDS[0].frames).shape == (len(RECORDS[0].frames), 3, 28, 28)
    judge = VisionJudge(network)
    notes = [judge.look(record, record.frames) for record in RECORDS]
    lines = {line["metric"]: line for line in score(notes)}
    assert set(lines) == {"frechet", "kid", "cmmd", "copy"}
    assert lines["frechet"]["value"] < 1e-6 and lines["cmmd"]["value"] < 1e-6
    frames = sum(len(record.frames) for record in RECORDS)
    assert {lines[key]["n"] for key in ("frechet", "kid", "cmmd")} == {frames}


def test_a_vision_model_that_lacks_weights_is_named(dino, tmp_path):
    from safetensors.torch import load_file, save_file

    for path in dino.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    lost = "encoder.layer.0.norm1.weight"
    save_file(
        {name: tensor for name, tensor in weights.items() if name != lost},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ValueError, match=f"lack '{lost}'"):
        ImageEncoder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as a vision model"):
        ImageEncoder(tmp_path)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    captions = [caption for record in RECORDS for caption in record.captions]
    tokenizer, _ = tiny_tokenizers(captions, max_length=24)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    text = dict(
        shape,
        vocab_size=len(tokenizer),
        max_position_embeddings=24,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(shape, image_size=32, patch_size=8)
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_clip_score_by_hand(clip):
    judge = ClipJudge(clip)
    record = RECORDS[0]
    (line,) = score([judge.look(record, record.frames)], ["clip"])
    by_hand = []
    for caption, frame in zip(record.captions, record.frames, strict=True):
        words = judge.tokenizer(caption, return_tensors="pt")
        with torch.no_grad():
            out = judge.model(
                **words, pixel_values=pixels([frame], 32, CLIP_IMAGE_MEAN, CLIP_IMAGE_STD)
            )
        a, b = (x[0] / x[0].norm() for x in (out.image_embeds, out.text_embeds))
        by_hand.append(100 * max(0, float(a @ b)))
    assert line["value"] == pytest.approx(numpy.mean(by_hand), abs=1e-3)
    assert line["n"] == len(record.frames)


def test_a_folder_without_clip_is_named(tmp_path):
    with pytest.raises(ValueError, match="CLIPModel"):
        ClipJudge(tmp_path)
    with pytest.raises(FileNotFoundError, match="clip"):
        ClipJudge(tmp_path / "nowhere")


# ---------------------------------------------------------------- who is where


NAMES = ("Milo", "Kiki")


def labelled(record, present):
    labels = [[name for name, there in zip(NAMES, row) if there] for row in present]
    return replace(record, truth=None, labels=labels)


def test_a_classifier_is_scored_against_labels_where_there_are_some():
    n = len(RECORDS[0].frames)

    def sees_milo(pictures):
        return torch.tensor([[1.0, -1.0]]).expand(len(pictures), 2)

    judge = ClassifierJudge(sees_milo, 16, characters=NAMES)
    record = labelled(RECORDS[0], [[1, 1]] * (n - 1) + [[1, 0]])
    notes = judge.look(record, record.frames)
    lines = {line["metric"]: line for line in score([notes])}
    assert lines["f1"]["value"] == pytest.approx(2 * n / (3 * n - 1))
    assert lines["frame"]["value"] == pytest.approx(1 / n)
    assert "against the labels" in lines["f1"]["name"]
    continued = judge.look(record, record.frames[1:], "continuation")
    assert torch.equal(continued["present"], notes["present"][1:])


def test_without_labels_the_true_frames_are_the_reference_and_the_name_says_so():
    judge = ClassifierJudge(lambda pictures: pictures.mean((2, 3)) - 0.5, 16)
    record = replace(RECORDS[0], truth=None)
    (line, *_) = score([judge.look(record, record.frames)])
    assert line["value"] == 1 and "what it sees in the true frames" in line["name"]


def test_labels_whose_order_nobody_knows_are_not_guessed():
    judge = ClassifierJudge(lambda pictures: pictures.mean((2, 3)) - 0.5, 16)
    record = labelled(RECORDS[0], [[1, 0]] * len(RECORDS[0].frames))
    assert "what it sees in the true frames" in judge.look(record, record.frames)["judge"]


def test_labels_of_another_data_set_are_refused():
    judge = ClassifierJudge(lambda pictures: pictures.mean((2, 3)) - 0.5, 16, characters=NAMES)
    record = labelled(RECORDS[0], [[1, 0]] * len(RECORDS[0].frames))
    with pytest.raises(ValueError, match="the labels know 2 characters, the classifier 3"):
        judge.look(record, record.frames)


def test_the_reader_cuts_out_who_it_sees(reader):
    finder = ReaderFinder(reader)
    for record, story in zip(RECORDS, STORIES):
        found = finder(record.frames, None, CHARACTERS)
        expected = {(k, a.name) for k, scene in enumerate(story.scenes) for a in scene.actors}
        assert set(found) == expected
        assert {picture.size for picture in found.values()} == {(32, 32)}


def test_two_in_a_frame_are_cut_out_left_and_right(reader):
    story = next(s for s in make_stories(20, "val") if len(s.scenes[-1].actors) == 2)
    frame = story.frames(size=64)[-1]
    found = ReaderFinder(reader)([frame], None, CHARACTERS)
    left, right = (found[0, actor.name] for actor in story.scenes[-1].actors)

    def offset(part):
        whole, piece = numpy.asarray(frame, int), numpy.asarray(part, int)
        fits = [
            numpy.abs(whole[y : y + 32, x : x + 32] - piece).sum()
            for y in range(33)
            for x in range(33)
        ]
        return int(numpy.argmin(fits)) % 33

    assert offset(left) < 16 < offset(right)


def test_labels_find_only_those_who_are_alone():
    frames = RECORDS[0].frames[:3]
    present = torch.tensor([[1, 0], [1, 1], [0, 1]]).bool()
    assert lone_characters(frames, present, ["Milo", "Kiki"]) == {
        (0, "Milo"): frames[0],
        (2, "Kiki"): frames[2],
    }


def test_references_that_are_handed_in_take_the_place_of_true_frames(tmp_path):
    for name, colour in (("Milo", "red"), ("Kiki", "blue")):
        (tmp_path / name).mkdir()
        for k in range(2):
            Image.new("RGB", (32, 32), colour).save(tmp_path / name / f"{k}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    references = read_references(tmp_path)
    assert {name: len(pictures) for name, pictures in references.items()} == dict(Milo=2, Kiki=2)
    record = labelled(RECORDS[0], [[1, 0], [0, 1], [1, 1]])
    drawn = [Image.new("RGB", (64, 64), colour) for colour in ("red", "red", "white")]
    judge = VisionJudge(VISION, lone_characters, references)
    lines = {line["metric"]: line for line in score([judge.look(record, drawn)])}
    red, blue = (VISION([Image.new("RGB", (8, 8), colour)])[0] for colour in ("red", "blue"))
    other = float(functional.cosine_similarity(red, blue, dim=0))
    # Milo is red as he should be, Kiki is red as well, and the last frame holds two: not found
    assert lines["reference"]["value"] == pytest.approx((1 + 0 + other + 0) / 4, abs=1e-5)
    assert lines["reference copy"]["value"] == pytest.approx(0.5)  # two equal references


def test_folders_without_references_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_references(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no pictures"):
        read_references(tmp_path)
    (tmp_path / "Milo").mkdir()
    (tmp_path / "Milo" / "0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="0.png: cannot be read"):
        read_references(tmp_path)


# ---------------------------------------------------------------- judging


@pytest.mark.parametrize("task", ["visualization", "continuation"])
def test_the_truth_is_judged_perfect_by_every_judge(reader, clip, task):
    torch.manual_seed(0)
    features = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 5))
    judges = [
        WorldJudge(reader),
        ClassifierJudge(features, 64),
        *inception_judges(features),
        VisionJudge(VISION, ReaderFinder(reader), style=True),
        ClipJudge(clip),
    ]
    lines = evaluate_stories(Drawn(), Dataset(), judges, task, progress=False)
    names = [line["name"] for line in lines]
    assert len(names) == len(set(names))
    perfect = dict.fromkeys(("facts", "stated", "history", "ceiling", "scarves", "f1"), 1)
    perfect |= dict.fromkeys(("frame", "count", "true style"), 1)
    perfect |= dict.fromkeys(("frechet", "cmmd"), 0)
    for line in lines:
        if line["metric"] in perfect:
            assert line["value"] == pytest.approx(perfect[line["metric"]], abs=2e-3), line
        if line["of"] == "frames" and line["metric"] != "copy":
            assert line["n"] == sum(len(r.frames) - (task == "continuation") for r in RECORDS)


def test_the_reader_judges_only_stories_with_a_truth(reader):
    record = replace(RECORDS[0], truth=None)
    with pytest.raises(ValueError, match="no truth"):
        WorldJudge(reader).look(record, record.frames)


NO_TRUTH_OF_OURS = {
    "a note": dict(note="mine"),
    "a text": "a true story",
    "a list": [1, 2],
    "a number": 0,
    "scenes of another world": dict(scenes=["a kitchen"] * len(RECORDS[0].captions), facts=[]),
    "another version": RECORDS[0].truth | dict(version=2),
    "without facts": {key: RECORDS[0].truth[key] for key in ("version", "seed", "scenes")},
    "an unknown setting": RECORDS[0].truth
    | dict(scenes=[scene | dict(setting="desert") for scene in RECORDS[0].truth["scenes"]]),
    "a fact of no frame": RECORDS[0].truth
    | dict(facts=[fact | dict(frame=99) for fact in RECORDS[0].truth["facts"]]),
    "an unknown attribute": RECORDS[0].truth
    | dict(facts=[fact | dict(attribute="mood") for fact in RECORDS[0].truth["facts"]]),
    "fewer scenes than captions": RECORDS[0].truth
    | dict(scenes=RECORDS[0].truth["scenes"][:-1], facts=[]),
}


@pytest.mark.parametrize("name", NO_TRUTH_OF_OURS)
def test_a_truth_of_another_world_is_none_to_the_reader(name, reader):
    "Whatever a user writes down as the truth: judged as if nothing had been written."
    record = labelled(RECORDS[0], [[1, 0]] * len(RECORDS[0].frames))
    foreign = replace(record, truth=NO_TRUTH_OF_OURS[name])
    assert world_truth(foreign) is None and world_truth(RECORDS[0]) == RECORDS[0].truth
    assert expected_characters(foreign)[0] == expected_characters(record)[0] == ["Milo"]
    with pytest.raises(ValueError, match="nothing to judge with"):
        make_judges(JudgeSettings(), foreign)
    with pytest.raises(ValueError, match="no truth of our world"):
        WorldJudge(reader).look(foreign, foreign.frames)
    judge = VisionJudge(VISION, lone_characters, style=True)
    lines, expected = (score([judge.look(one, one.frames)]) for one in (foreign, record))
    assert [line["value"] for line in lines] == [line["value"] for line in expected]


def test_frames_of_another_size_are_judged_alike(reader):
    "Stories that are stored larger than a model draws, and one's own pictures as they are."
    large = [frame.resize((128, 128)) for frame in RECORDS[1].frames]
    record = replace(RECORDS[1], frames=large)
    small = [frame.resize((64, 64)) for frame in large]
    for task, drawn in (("continuation", small[1:]), ("visualization", small)):
        lines = {
            line["metric"]: line for line in score([WorldJudge(reader).look(record, drawn, task)])
        }
        assert lines["true style"]["value"] > 0.999
    mixed = [frame.resize((40 + 8 * k,) * 2) for k, frame in enumerate(large)]
    for judge in inception_judges(lambda pictures: pictures.mean((2, 3))):
        assert len(judge.look(replace(record, frames=mixed), mixed)["real"]) == len(mixed)


@pytest.mark.parametrize("first", [True, False])
def test_a_story_without_labels_counts_where_none_are_needed(first):
    judge = VisionJudge(VISION, lone_characters)
    n = len(RECORDS[0].frames)
    told = labelled(RECORDS[0], [[1, 0]] * n)
    records = [told, replace(told, labels=None)][:: 1 if first else -1]
    notes = [judge.look(record, record.frames) for record in records]
    lines = {line["metric"]: line for line in score(notes)}
    [alone] = score([judge.look(told, told.frames)], ["reference"])
    assert lines["reference"]["value"] == alone["value"] and lines["reference"]["n"] == alone["n"]
    classifier = ClassifierJudge(lambda x: x.mean((2, 3))[:, :2] - 0.5, 16, characters=NAMES)
    notes = [classifier.look(record, record.frames) for record in records]
    with pytest.raises(ValueError, match="1 by your classifier, against the labels; .*of all, or"):
        score(notes)


def test_in_continuation_the_given_frame_can_be_copied(reader):
    record = RECORDS[1]
    drawn = [record.frames[0]] * (len(record.frames) - 1)
    notes = WorldJudge(reader).look(record, drawn, "continuation")
    assert len(notes["last"]) == len(drawn)
    (line,) = score([notes], ["copy"])
    assert line["n"] == len(drawn) and line["value"] > 0.7


class Team:
    "Stands for one of several processes; what they gather is put together by the test."

    num_processes = 2

    def __init__(self, process_index):
        self.process_index = process_index


def test_processes_share_the_stories_and_all_get_the_same_scores(monkeypatch):
    judges = [VisionJudge(VISION)]
    alone = evaluate_stories(Drawn(), Dataset(), judges, progress=False)
    shares = []

    def keep(notes):
        shares.append(notes)
        return notes

    monkeypatch.setattr("accelerate.utils.gather_object", keep)
    for process in (0, 1):
        evaluate_stories(Drawn(), Dataset(), judges, progress=False, accelerator=Team(process))
    assert [[number for number, _ in notes] for notes in shares] == [[0, 2], [1, 3]]
    monkeypatch.setattr("accelerate.utils.gather_object", lambda notes: shares[1] + shares[0])
    together = evaluate_stories(Drawn(), Dataset(), judges, progress=False, accelerator=Team(0))
    assert together == alone


def test_a_story_that_is_not_there_is_named_before_anything_is_judged():
    with pytest.raises(
        ValueError, match="stories.h5: there is no story 9; split 'test' has 0 to 3"
    ):
        evaluate_stories(Drawn(), Dataset(), [None], index=[0, 9], progress=False)


def test_who_judges_follows_from_settings_and_data(reader, clip, dino, tmp_path):
    network = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    torch.jit.script(network).save(str(tmp_path / "net.pt"))
    unknown = replace(RECORDS[0], truth=None)
    world = [type(judge) for judge in make_judges(JudgeSettings(), RECORDS[0])]
    assert world == [WorldJudge]
    everything = JudgeSettings(
        classifier=str(tmp_path / "net.pt"),
        inception=str(tmp_path / "net.pt"),
        clip=str(clip),
        vision=str(dino),
        style=str(tmp_path / "net.pt"),
    )
    kinds = [type(judge) for judge in make_judges(everything, unknown)]
    assert kinds == [ClassifierJudge, *[VisionJudge] * 2, ClipJudge, *[VisionJudge] * 2]
    with pytest.raises(ValueError, match="nothing to judge with"):
        make_judges(JudgeSettings(), unknown)
    with pytest.raises(FileNotFoundError, match="reader"):
        make_judges(JudgeSettings(reader=str(tmp_path / "nowhere")), RECORDS[0])
