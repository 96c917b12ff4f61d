"""Recipes that must be refused: made by hand with the place of the mistake, and made from a valid one by breaking it.

They only use methods and options that exist here (heads.prune with keep, tokens.merge, quantize.int8).
"""

VALID = """\
# prune, then quantize
seed: 3
calibrate:
  data: text.txt
  samples: 4
  length: 32
  batch: 2
  column: text
steps:
  - use: heads.prune
    keep: 0.5
    only: ["*"]
    except: ["*.0.*"]
  - use: quantize.int8
validate:
  data: test.txt
  split: test
  samples: 4
  perplexity: 1.05x
  kl: 0.05
  top1: -0.2
  accuracy: +0.5
  size:
  latency: true
emit:
  format: auto
  shard: 2GB
"""

STEPS = "steps:\n  - use: heads.prune\n    keep: 0.5\n"

# text, line and column of the first mistake, a part of its message
BY_HAND = [
    # not a recipe at all
    ("", "1:1", "it is empty, it must be a mapping"),
    ("# nothing but a comment\n", "1:1", "it is empty"),
    ("\n\n", "1:1", "it is empty"),
    ("heads.prune", "1:1", "it is 'heads.prune', it must be a mapping"),
    ("3", "1:1", "it is 3, it must be a mapping"),
    ("- use: heads.prune\n", "1:1", "it is a list, it must be a mapping"),
    ("{}", "1:1", "steps is missing"),
    ("seed: 1\n", "1:1", "steps is missing"),
    # YAML itself
    ("steps: [", "1:9", "expected the node content"),
    ("steps:\n\t- use: heads.prune\n", "2:1", "a tab stands where only spaces may"),
    ("steps:\n  - use: heads.prune\n   keep: 0.5\n", "3:4", "YAML"),
    ("steps:\n  - use: heads.prune\n    keep 0.5\n", "4:1", "YAML"),
    ("steps:\n  - use: heads.prune\n    keep: 0.5: 1\n", "3:14", "mapping values are not allowed here"),
    ('steps:\n  - use: "heads.prune\n', "3:1", "while scanning a quoted scalar (since line 2, column 10)"),
    ("steps: *nowhere\n", "1:8", "found undefined alias 'nowhere'"),
    ("a: &x 1\nb: &x 2\n", "2:4", "found duplicate anchor 'x'"),
    (STEPS + "---\n" + STEPS, "4:1", "a second document starts here"),
    ("steps:\x00", "1:7", "character 0x0 is no text"),
    ("seed: 1\nsteps: \x07", "2:8", "character 0x7 is no text"),
    ('seed: "\\UFFFFFFFF"\n' + STEPS, "1:10", "too large"),
    ('seed: "\\ud800"\n' + STEPS, "1:7", "cannot be read"),
    ("[" * 500, "1:17", "nested too deeply"),
    ("%YAML 9.0\n---\n" + STEPS, "1:1", "incompatible YAML document"),
    ("%YAML 1." + "9" * 5000 + "\n---\n" + STEPS, "1:9", "too large"),
    (
        "a: &a [1, 2]\n" + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdef", "bcdefg")),
        "",
        "YAML",
    ),
    ("steps: &s [*s]\n", "1:8", "too many values"),
    ("steps: `date`\n", "1:8", "cannot start any token"),
    ("steps: !!python/object/apply:os.system [echo]\n", "1:8", "!!python/object/apply:os.system cannot be read"),
    ("seed: !!python/name:os.system\n" + STEPS, "1:7", "!!python/name:os.system"),
    ("seed: !mine 3\n" + STEPS, "1:7", "!mine '3' cannot be read"),
    ("seed: !!int three\n" + STEPS, "1:7", "!!int 'three' cannot be read"),
    ("seed: !!float 1e999\n" + STEPS, "1:7", "cannot be read"),
    ("seed: !!timestamp 2026-01-01\n" + STEPS, "1:7", "!!timestamp"),
    ("steps: !!set {heads.prune}\n", "1:8", "!!set cannot be read"),
    # keys
    ("1: 2\n" + STEPS, "1:1", "the key '1' is no text"),
    ("true: 2\n" + STEPS, "1:1", "the key 'true' is no text"),
    ("? [seed]\n: 2\n" + STEPS, "1:3", "a key is a list or a mapping"),
    ("~: 2\n" + STEPS, "1:1", "the key '~' is no text"),
    ("on: 2\n" + STEPS, "1:1", "on is no key here"),
    ("<<: {seed: 1}\n" + STEPS, "1:1", "<< is no key here"),
    ("seed: 1\n" + STEPS + "seed: 2\n", "5:1", "seed stands twice, first in line 1"),
    ("step:\n  - use: heads.prune\n", "1:1", "step is no key here; did you mean steps?"),
    (STEPS + "validation: {size: 1x}\n", "4:1", "validation is no key here; did you mean validate?"),
    ('"two words": 1\n' + STEPS, "1:1", "'two words' is no key here"),
    # sections
    ("seed: one\n" + STEPS, "1:7", "seed is 'one', it must be a whole number at least 0 and at most 4294967295"),
    ("seed: 1.5\n" + STEPS, "1:7", "it must be a whole number"),
    ("seed: true\n" + STEPS, "1:7", "seed is true, it must be a whole number"),
    ("seed:\n" + STEPS, "1:6", "seed is empty, it must be a whole number"),
    ("seed: -1\n" + STEPS, "1:7", "seed is -1, it must be at least 0 and at most 4294967295"),
    ("seed: 012\n" + STEPS, "1:7", "seed is '012', it must be a whole number"),
    ("seed: 2026-01-01\n" + STEPS, "1:7", "seed is '2026-01-01', it must be a whole number"),
    ("seed: 1:30\n" + STEPS, "1:7", "seed is '1:30', it must be a whole number"),
    ("seed: " + "9" * 5000 + "\n" + STEPS, "1:7", "it must be a whole number"),
    ("calibrate:\n" + STEPS, "1:11", "calibrate: it is empty, it must be a mapping"),
    ("calibrate: text.txt\n" + STEPS, "1:12", "calibrate: it is 'text.txt', it must be a mapping"),
    ("calibrate: {data: 3}\n" + STEPS, "1:19", "calibrate: data is 3, it must be text"),
    ('calibrate: {data: ""}\n' + STEPS, "1:19", "data is '', it must be at least 1 characters long"),
    ("calibrate: {data: x, sample: 3}\n" + STEPS, "1:22", "sample is no key here; did you mean samples?"),
    ("calibrate: {data: x, samples: 0}\n" + STEPS, "1:31", "samples is 0, it must be at least 1"),
    ("calibrate: {data: x, samples: '8'}\n" + STEPS, "1:31", "samples is '8', it must be a whole number"),
    ("calibrate: {data: x, kl: 1}\n" + STEPS, "1:22", "kl is no key here"),
    (STEPS + "emit: native\n", "4:7", "emit: it is 'native', it must be a mapping"),
    (STEPS + "emit: {format: natve}\n", "4:16", "format is 'natve', it must be auto, native, compressed-tensors or"),
    (STEPS + "emit: {shard: 5}\n", "4:15", "shard is 5, it must be text like 5GB"),
    (STEPS + "emit: {shard: 5 gigabytes}\n", "4:15", "shard is '5 gigabytes', it must be text like 5GB"),
    (STEPS + "emit: {shard: 0GB}\n", "4:15", "it must be text like 5GB"),
    # steps
    ("steps:\n", "1:7", "steps is empty, it must be a list of steps"),
    ("steps: []\n", "1:8", "steps is an empty list, it must be a list of steps"),
    ("steps: {use: heads.prune}\n", "1:8", "steps is a mapping, it must be a list of steps"),
    ("steps: heads.prune\n", "1:8", "steps is 'heads.prune', it must be a list of steps"),
    ("steps:\n  - heads.prune\n", "2:5", "it is 'heads.prune', it must be a mapping with use"),
    ("steps:\n  -\n", "2:4", "it is empty, it must be a mapping with use"),
    ("steps:\n  - keep: 0.5\n", "2:5", "use is missing, it must name a method"),
    ("steps:\n  - use:\n", "2:9", "use is empty, it must name a method"),
    ("steps:\n  - use: [heads.prune]\n", "2:10", "use is a list, it must name a method"),
    (
        "steps:\n  - use: heads.prunes\n",
        "2:10",
        "use is 'heads.prunes', it must name a method; did you mean heads.prune?",
    ),
    ("steps:\n  - use: os.system\n", "2:10", "use is 'os.system', it must name a method"),
    ("steps:\n  - use: heads\n", "2:10", "use is 'heads', it must name a method"),
    ("steps:\n  - use: heads.prune\n    kep: 0.5\n", "3:5", "heads.prune: kep is no key here; did you mean keep?"),
    ("steps:\n  - use: heads.prune\n    skip: ['*']\n", "3:5", "skip is no key here"),
    (
        "steps:\n  - use: heads.prune\n    keep: 1.5\n",
        "3:11",
        "heads.prune: keep is 1.5, it must be above 0 and at most 1",
    ),
    ("steps:\n  - use: heads.prune\n    keep: .nan\n", "3:11", "keep is '.nan', it must be a number"),
    ("steps:\n  - use: heads.prune\n    keep: yes\n", "3:11", "keep is 'yes', it must be a number"),
    ("steps:\n  - use: heads.prune\n    keep: 1e999\n", "3:11", "cannot be read"),
    ("steps:\n  - use: heads.prune\n    only: a.*\n", "3:11", "only is 'a.*', it must be a list"),
    ("steps:\n  - use: heads.prune\n    except: [1]\n", "3:14", "except.0 is 1, it must be text"),
    ("steps:\n  - use: heads.prune\n    only:\n", "3:10", "only is empty, it must be a list"),
    (
        "steps:\n  - use: quantize.int8\n  - use: heads.prune\n",
        "3:10",
        "stands after quantize.int8, it must stand before",
    ),
    (
        "steps:\n  - use: quantize.int8\n  - use: tokens.merge\n",
        "3:10",
        "(order: heads, tokens, sharing, linear, quantize)",
    ),
    # validate
    (STEPS + "validate:\n", "4:10", "validate: it is empty, it must be a mapping with metrics"),
    (STEPS + "validate: perplexity\n", "4:11", "validate: it is 'perplexity', it must be a mapping with metrics"),
    (STEPS + "validate: {data: x}\n", "4:11", "no metric is named, it must be at least one (metrics: perplexity, kl"),
    (STEPS + "validate: {perplexty: 1.05x}\n", "4:12", "perplexty is no key here; did you mean perplexity?"),
    (STEPS + "validate: {limits: {}}\n", "4:12", "limits is no key here"),
    (STEPS + "validate: {kl: 1.05y}\n", "4:16", "kl is '1.05y', it must be a number (bound), 1.05x"),
    (STEPS + "validate: {kl: x}\n", "4:16", "kl is 'x'"),
    (STEPS + "validate: {kl: 0x}\n", "4:16", "kl is '0x'"),
    (STEPS + "validate: {kl: +1.05x}\n", "4:16", "kl is '+1.05x'"),
    (STEPS + "validate: {kl: 1.05x}\n", "4:16", "kl is '1.05x', it must be a number, for before it is 0"),
    (STEPS + "validate: {kl: false}\n", "4:16", "kl is false"),
    (STEPS + "validate: {kl: [0.1]}\n", "4:16", "kl is a list"),
    (STEPS + "validate: {kl: 10%}\n", "4:16", "kl is '10%'"),
    (STEPS + "validate: {kl: 1, samples: many}\n", "4:28", "samples is 'many', it must be a whole number at least 1"),
]

WRONG = ("[[1]]", "{a: 1}", "false", "!!binary aGk=", "*nowhere", "@", "- 1")
WRONG_NUMBERS = ("'1'", "1_0", "0x10", "+1", "-1", ".inf", "one", "")


def generated():
    """Yields what was done to the valid recipe, the broken text, and the line of the mistake (None: further down)."""
    lines = VALID.splitlines()

    def with_line(index: int, *new: str) -> str:
        return "\n".join([*lines[:index], *new, *lines[index + 1 :]]) + "\n"

    for index, line in enumerate(lines[1:], start=1):
        before, _, value = line.partition(":")
        key, number = before.strip(" -"), index + 1
        indent = " " * before.index(key)
        yield f"{number} {key} renamed", with_line(index, f"{before}q:{value}"), number
        yield f"{number} {key} repeated", with_line(index, line, f"{indent}{key}:{value}"), number + 1
        yield f"{number} {key} after a tab", with_line(index, f"\t{line}"), None
        if "-" not in before:
            yield f"{number} a key before {key}", with_line(index, f"{indent}unheard: 1", line), number
        if value:
            yield f"{number} {key} never closed", with_line(index, f"{before}: 'text"), None
            for wrong in WRONG:
                yield f"{number} {key} is {wrong}", with_line(index, f"{before}: {wrong}"), number
        if key in ("seed", "samples", "length", "batch", "keep"):
            for wrong in WRONG_NUMBERS:
                yield f"{number} {key} is {wrong}", with_line(index, f"{before}: {wrong}"), number
    for end in range(VALID.index("[") + 1, VALID.index("]") + 1):
        yield f"cut after {end} characters", VALID[:end], None
