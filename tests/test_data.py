"""Batches from every kind of file, folder and iterable; what cannot be read is refused in one line."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from compress.data import Batches, batches
from compress.errors import CompressError
from compress.trajectory import calls_of, listening, pipeline_sampler, replay_sampler, runs

WORDS = ("[PAD]", "[BOS]", "[UNK]", *(f"w{number}" for number in range(60)))
SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
OPTIONS = {"samples": 4, "length": 8, "batch": 2, "seed": 0}


def tokenizer(bos: bool = False, pad: str | None = "[PAD]"):
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=pad, eos_token="[UNK]")


def source(model, processor=None, library="transformers", folder=None, pipeline=None):
    return SimpleNamespace(model=model.eval(), processor=processor, library=library, folder=folder, pipeline=pipeline)


def decoder(**options):
    config = transformers.LlamaConfig(vocab_size=len(WORDS), num_key_value_heads=1, max_position_embeddings=32, **SIZE)
    return source(transformers.LlamaForCausalLM(config), tokenizer(**options))


def encoder(kind=transformers.BertModel, **options):
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **SIZE, **options)
    return source(kind(config), tokenizer())


def classifier(names=("apple", "pear")):
    config = transformers.ViTConfig(image_size=8, patch_size=4, **SIZE)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    return source(transformers.ViTForImageClassification(config), Pixels())


class Pixels:
    """An image processor in three lines; the real ones are long to build."""

    image_mean = 0.0

    def __call__(self, images, return_tensors):
        values = [torch.tensor(list(image.resize((8, 8)).tobytes())).view(8, 8, 3) for image in images]
        return {"pixel_values": torch.stack(values).permute(0, 3, 1, 2) / 255, "unused": None}


def dit():
    sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 2, "out_channels": 2}
    return DiTTransformer2DModel(**sizes, num_layers=1, sample_size=8, num_embeds_ada_norm=1000)


@pytest.fixture
def read(tmp_path):
    """`batches` with a cache of its own."""
    return lambda spec, source, **options: batches(spec, source, **(OPTIONS | options), cache=tmp_path / "cache")


def photo(path, color):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), color).save(path)
    return path


def filled(path, data=b""):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def lines(count, words=5):
    return [" ".join(f"w{(5 * line + word) % 60}" for word in range(words)) for line in range(count)]


def write(path, rows):
    """Rows as the kind of file that the name says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow.parquet import write_table

        write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def test_a_decoder_reads_windows_of_one_stream(read, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n".join(lines(20)))
    found = read(file, decoder(), seed=None)
    assert [item["input_ids"].shape for item in found] == [(2, 8), (2, 8)]
    ids = torch.cat([item["input_ids"] for item in found]).flatten()
    assert ids.tolist() == [3 + number for number in range(32)], "the windows follow each other without a gap"
    assert all(item["attention_mask"].all() for item in found)


def test_every_window_begins_as_the_tokenizer_begins_a_text(read, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n".join(lines(20)))
    ids = torch.cat([item["input_ids"] for item in read(file, decoder(bos=True), seed=None)])
    assert ids[:, 0].tolist() == [1] * 4
    assert ids[:, 1:].flatten().tolist() == [3 + number for number in range(28)]


def test_seeds_draw_windows(read, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n".join(lines(100)))
    first, again, other = (
        torch.cat([item["input_ids"] for item in read(file, decoder(), seed=seed)]) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_encoder_reads_one_text_a_row(read, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("w0 w1\n\nw2 w3 w4\n")
    found = read(file, encoder())
    assert found[0]["input_ids"].tolist() == [[3, 4, 0], [5, 6, 7]]
    assert found[0]["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert set(found[0]) == {"input_ids", "attention_mask"}
    assert found.note == "2 samples, all there are of 4 asked for"


def test_a_long_text_is_cut_at_what_the_model_takes(read, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(lines(10)))
    assert read(file, encoder(), length=99)[0]["input_ids"].shape == (1, 16)


def test_an_encoder_decoder_gets_both_texts(read, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("w0 w1\nw2 w3 w4\n")
    config = transformers.T5Config(vocab_size=len(WORDS), d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4)
    config.decoder_start_token_id = 0
    model = source(transformers.T5ForConditionalGeneration(config), tokenizer())
    batch = read(file, model)[0]
    assert batch["decoder_input_ids"].tolist() == [[0, 3, 4], [0, 5, 6]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert model.model(**batch).logits.shape == (2, 3, len(WORDS))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv", ".tsv"])
def test_tables(read, tmp_path, suffix):
    rows = [{"number": line, "text": text, "label": line % 2} for line, text in enumerate(lines(6))]
    file = write(tmp_path / f"table{suffix}", rows)
    found = read(file, encoder(), seed=None, samples=6)
    assert torch.cat([item["input_ids"] for item in found]).tolist()[1] == [8, 9, 10, 11, 12]
    classes = encoder(transformers.BertForSequenceClassification)
    if suffix in (".jsonl", ".parquet"):
        labels = torch.cat([item["labels"] for item in read(file, classes, seed=None, samples=6)])
        assert labels.tolist() == [0, 1, 0, 1, 0, 1]


def test_the_only_text_column_is_found_and_others_are_named(read, tmp_path):
    one = write(tmp_path / "one.jsonl", [{"id": 1, "sentence": "w0 w1"}])
    assert read(one, encoder())[0]["input_ids"].tolist() == [[3, 4]]
    two = write(tmp_path / "two.jsonl", [{"sentence": "w0 w1", "other": "w2"}])
    assert read(two, encoder(), column="other")[0]["input_ids"].tolist() == [[5]]
    with pytest.raises(
        CompressError, match=r"no column text or image; name one with column \(columns: sentence, other\)"
    ):
        read(two, encoder())
    with pytest.raises(CompressError, match="no column sentense; did you mean sentence"):
        read(two, encoder(), column="sentense")


def test_a_folder_of_texts(read, tmp_path):
    for number, text in enumerate((b"w0 w1", b"w2 w3")):
        filled(tmp_path / "texts" / f"{number}.txt", text)
    assert read(tmp_path / "texts", encoder())[0]["input_ids"].tolist() == [[3, 4], [5, 6]]


def test_images_in_class_folders(read, tmp_path):
    for name, color in (("pear", (0, 255, 0)), ("apple", (255, 0, 0))):
        for number in range(3):
            photo(tmp_path / "photos" / "train" / name / f"{number}.png", color)
    found = read(tmp_path / "photos", classifier(), split="train", seed=None)
    assert set(found[0]) == {"pixel_values", "labels"}
    assert found[0]["labels"].tolist() == [0, 1], "classes take turns"
    assert found[0]["pixel_values"][:, :, 0, 0].tolist() == [[1, 0, 0], [0, 1, 0]]
    sorted_names = read(tmp_path / "photos", classifier(("LABEL_0", "LABEL_1")), split="train", seed=None)
    assert sorted_names[0]["labels"].tolist() == [0, 1]
    for name, color in (("2", (0, 255, 0)), ("10", (255, 0, 0))):
        photo(tmp_path / "numbers" / name / "0.png", color)
    eleven = classifier(tuple(f"LABEL_{number}" for number in range(11)))
    assert read(tmp_path / "numbers", eleven, seed=None)[0]["labels"].tolist() == [10, 2]
    with pytest.raises(CompressError, match="no split trian; did you mean train"):
        read(tmp_path / "photos", classifier(), split="trian")
    with pytest.raises(CompressError, match="pear is no class of the model; did you mean pears"):
        read(tmp_path / "photos", classifier(("apple", "pears", "plum")), split="train")


def test_images_of_a_table_and_without_labels(read, tmp_path):
    data = photo(tmp_path / "one.png", (0, 0, 255)).read_bytes()
    file = write(tmp_path / "table.parquet", [{"image": {"bytes": data, "path": None}}])
    for spec in (file, tmp_path / "one.png"):
        (batch,) = read(spec, classifier())
        assert set(batch) == {"pixel_values"}
        assert batch["pixel_values"][0, :, 0, 0].tolist() == [0, 0, 1]


def test_recorded_calls_keep_their_order(read, tmp_path):
    file = tmp_path / "calls.safetensors"
    calls = {
        "hidden_states": torch.randn(5, 2, 8, 8),
        "timestep": torch.arange(5),
        "class_labels": torch.zeros(5).long(),
    }
    save_file(calls, file)
    found = read(file, source(dit(), library="diffusers"), samples=5)
    assert [item["timestep"].tolist() for item in found] == [[0], [1], [2], [3], [4]]
    assert torch.equal(torch.cat([item["hidden_states"] for item in found]), calls["hidden_states"])
    save_file(calls | {"timestep": torch.arange(4)}, file)
    with pytest.raises(CompressError, match="the first dimensions differ"):
        read(file, source(dit(), library="diffusers"))
    save_file({"hiden_states": torch.zeros(2, 2)}, file)
    with pytest.raises(CompressError, match="takes no hiden_states; did you mean hidden_states"):
        read(file, source(dit(), library="diffusers"))
    file.write_text("no tensors")
    with pytest.raises(CompressError, match="is no safetensors file"):
        read(file, source(dit(), library="diffusers"))


def test_items_of_the_user(read):
    from PIL import Image

    ready = [{"input_ids": torch.tensor([[number, 4]]), "attention_mask": torch.ones(1, 2)} for number in range(9)]
    assert [item["input_ids"][0, 0].item() for item in read(iter(ready), encoder())] == [0, 1, 2, 3]
    assert read(["w0 w1", "w2"], encoder())[0]["input_ids"].tolist() == [[3, 4], [5, 0]]
    assert read([("w0", 1)], encoder(transformers.BertForSequenceClassification))[0]["labels"].tolist() == [1]
    (windows,) = read(("w0" for _ in range(40)), decoder(), batch=8)
    assert windows["input_ids"].shape == (4, 8), "short texts make as many windows as were asked for"
    image = Image.new("RGB", (9, 9), (255, 0, 0))
    assert read([(image, "pear")], classifier())[0]["labels"].tolist() == [1]
    assert set(read([image], classifier())[0]) == {"pixel_values"}


def test_batches_take_the_models_dtype(read):
    model = classifier()
    model.model.to(torch.bfloat16)
    (batch,) = read([{"pixel_values": torch.zeros(2, 3, 8, 8), "labels": torch.tensor([0, 1])}], model)
    assert (batch["pixel_values"].dtype, batch["labels"].dtype) == (torch.bfloat16, torch.int64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: "missing.txt", "missing.txt does not exist"),
        (lambda path: str(path / "no" / "where"), "does not exist"),
        (lambda path: filled(path / "a.jsonl").with_name("a.jsnl"), "does not exist; did you mean a.jsonl"),
        (lambda path: filled(path / "e.txt"), "is empty"),
        (lambda path: filled(path / "w.txt", b"\n \n"), "holds no sample"),
        (lambda path: filled(path / "b.txt", b"\xff\xfe\xff"), "is no UTF-8 text"),
        (lambda path: filled(path / "a.pdf"), "is a .pdf file; it must be one of .txt"),
        (lambda path: filled(path / "j.jsonl", b"{}\n{"), "j.jsonl:2: no JSON"),
        (lambda path: filled(path / "l.jsonl", b"[1]"), "is a JSON list"),
        (lambda path: filled(path / "p.parquet", b"x"), "is no parquet file"),
        (lambda path: filled(path / "d" / "a.dat").parent, "holds neither images in class folders nor texts"),
        (lambda path: write(path / "n.jsonl", [{"text": 7}]), "text of row 1 is a int, it must be a text or an image"),
        (lambda path: (filled(path / "t.txt"), {"split": "test"}), "is one file and has no splits"),
        (lambda path: (filled(path / "t.txt"), {"column": "text"}), "is no table and has no columns"),
        (lambda path: (filled(path / "d" / "t.txt").parent, {"column": "text"}), "is no table and has no columns"),
        (lambda path: [3.5], "an item is a float"),
        (lambda path: [], "holds no sample"),
        (lambda path: [{"input_ids": 3}], "an item holds no tensor"),
        (lambda path: [{"inputs_id": torch.zeros(1, 2)}], "the model reads input_ids, the samples give inputs_id"),
        (lambda path: "trajectory", "needs a whole pipeline"),
        (lambda path: photo(path / "a.png", "red"), "has no preprocessor_config.json"),
    ],
)
def test_refusals_are_one_line(read, tmp_path, make, message):
    given = make(tmp_path)
    spec, options = given if isinstance(given, tuple) else (given, {})
    with pytest.raises(CompressError, match=message) as caught:
        read(spec, encoder(), **options)
    assert "\n" not in str(caught.value)


def test_what_the_model_lacks_is_named(read, tmp_path):
    model = encoder()
    model.processor = None
    with pytest.raises(CompressError, match="has no tokenizer files"):
        read(["w0"], model)
    (tmp_path / "fake.png").write_text("no image")
    with pytest.raises(CompressError, match=r"fake.png cannot be read as an image"):
        read(tmp_path / "fake.png", classifier())
    with pytest.raises(CompressError, match="a diffusers model takes no texts or images"):
        read(["w0"], source(dit(), library="diffusers"))
    with pytest.raises(CompressError, match="a label is 2; the model has the classes 0 to 1"):
        read([("w0", 2)], encoder(transformers.BertForSequenceClassification))


def test_the_cache_follows_the_file_and_survives_damage(tmp_path):
    cache, file, model = tmp_path / "cache", tmp_path / "text.txt", encoder()
    file.write_text("w0 w1\n")
    first = batches(file, model, **OPTIONS, cache=cache)
    (kept,) = cache.iterdir()
    save_file({"0.input_ids": torch.tensor([[9]])}, kept)
    assert batches(file, model, **OPTIONS, cache=cache)[0]["input_ids"].tolist() == [[9]], "the kept batches are used"
    kept.write_text("damaged")
    assert torch.equal(batches(file, model, **OPTIONS, cache=cache)[0]["input_ids"], first[0]["input_ids"])
    file.write_text("w5 w6 w7\n")
    assert batches(file, model, **OPTIONS, cache=cache)[0]["input_ids"].tolist() == [[8, 9, 10]]
    batches(file, model, **(OPTIONS | {"batch": 1}), cache=cache)
    batches(file, encoder(type_vocab_size=3), **OPTIONS, cache=cache)
    assert len(list(cache.iterdir())) == 4


def pipeline():
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(block_out_channels=(4,), latent_channels=2, norm_num_groups=2, sample_size=8).eval()
    made = DiTPipeline(dit().eval(), vae, DDIMScheduler())
    made.set_progress_bar_config(disable=True)
    return made


def test_a_pipelines_own_trajectory(read, tmp_path):
    made = pipeline()
    model = source(made.transformer, library="diffusers", folder=tmp_path / "folder", pipeline=made)
    model.component = "transformer"
    found = read("trajectory", model, samples=6, length=3)
    assert isinstance(found, Batches)
    assert len(found) == 6
    times = [item["timestep"][0].item() for item in found]
    assert times[:3] == times[3:] == sorted(set(times), reverse=True), "two samplings of three steps, in order"
    assert found[0]["hidden_states"].shape == (4, 2, 8, 8), "two images, each with and without its class"
    assert not torch.equal(found[0]["hidden_states"], found[3]["hidden_states"]), "each sampling has its own seed"
    again = read("trajectory", model, samples=6, length=3)
    assert all(torch.equal(a["hidden_states"], b["hidden_states"]) for a, b in zip(found, again, strict=True))


def test_a_pipeline_samples_with_another_model():
    made = pipeline()
    model = source(made.transformer, library="diffusers", pipeline=made)
    model.component = "transformer"
    sample = pipeline_sampler(model, seed=0, batch=1, length=3)
    own = sample(made.transformer)
    assert torch.equal(own, sample(made.transformer))
    assert not torch.equal(own, sample(dit().eval()))
    assert made.transformer is model.model


def test_recorded_samplings_come_step_by_step():
    rows = {"timestep": torch.tensor([9, 5, 1, 9, 5, 1, 9, 5, 1]), "sample": torch.arange(9)}

    def picked(samples, batch):
        return [call["sample"].tolist() for call in calls_of(rows, samples, batch)]

    assert picked(9, 2) == [[0, 3], [1, 4], [2, 5], [6], [7], [8]]
    assert picked(8, 8) == [[0, 3], [1, 4], [2, 5]], "a sampling cut short is left out"
    assert picked(2, 8) == [[0], [1]]
    rows["timestep"] = torch.tensor([9, 5, 1, 7, 3, 8, 2, 6, 4])
    assert picked(9, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]], "no sampling: rows as they are"
    assert runs([]) == []


def euler(model, x, labels, steps=4):
    """A plain Euler sampling of a denoiser that answers with noise and variance channels alike."""
    with listening(model) as calls, torch.no_grad():
        for time in range(steps, 0, -1):
            x = 0.9 * x - 0.1 * time * model(x, torch.full((len(x),), time), labels).sample
    return x, calls


@pytest.mark.parametrize("batch", [1, 2])
def test_a_recorded_sampling_is_run_again(batch):
    torch.manual_seed(0)
    model, other = dit().eval(), dit().eval()
    labels, noise = torch.tensor([1, 3]), torch.randn(2, 2, 8, 8)
    _, calls = euler(model, noise, labels)
    rows = {name: torch.stack([call[name] for call in calls], 1).flatten(0, 1) for name in calls[0]}
    recorded = calls_of(rows, samples=8, batch=batch)
    sample = replay_sampler(recorded, model)
    for candidate in (model, other):
        expected, its_calls = euler(candidate, noise, labels)
        torch.testing.assert_close(sample(candidate), its_calls[-1]["hidden_states"], rtol=1e-4, atol=1e-5)
        assert not torch.equal(expected, noise)
    rows["hidden_states"] = rows["hidden_states"] + 0.1 * torch.randn_like(rows["hidden_states"])
    with pytest.raises(CompressError, match="cannot be run again"):
        replay_sampler(calls_of(rows, 8, batch), model)
    with pytest.raises(CompressError, match="at least two steps"):
        replay_sampler([{name: value[:1] for name, value in rows.items()}], model)
