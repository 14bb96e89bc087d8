"""Transformers' own tests of a model, run against RiGPT from outside.

    python tests/contracts/upstream.py FOLDER [--sets NAME ...] [-k EXPRESSION]

`FOLDER` is an unpacked source distribution of the installed Transformers. It holds the tests of every model and of
training; the tests of generation, export and pipelines are only in a checkout, which may be given instead. Needs the
package `parameterized`. A set takes about a minute on one core.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import types
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree


SETS = {
    "tied": {},
    "projections": {"embedding_size": 24, "output_bias": True, "tie_word_embeddings": False},
    "learned": {"position_embedding_type": "learned"},
    "frequencies": {"rotary_learned_frequencies": True},
    "distance": {"attention_score": "distance", "qk_norm": True},
    "local": {"local_frames": True, "embedding_norm": True},
    "midpoint": {"depth_solver": "midpoint", "depth_interpolation": "linear"},
    "dopri5": {"depth_solver": "dopri5"},
}
# Tests that ask for what a set of options refuses or is not: why, by what finds their names.
EXPECTED = {
    "learned": {"test_model_rope_": "a table of positions has no rope parameters, and ends"},
    "frequencies": {"test_model_rope_scaling_from_config_1_dynamic": "learned frequencies know no length"},
    "distance": {"test_can_set_attention_dynamically|test_sdpa_can_dispatch": "SDPA computes no distances"},
    "midpoint": {"test_attention_outputs": "attentions of every evaluation of a layer are returned"},
    "dopri5": {
        "test_attention_outputs": "attentions of every evaluation of a layer are returned",
        "test_eager_matches_sdpa_inference_.*(fp16|bf16)": "16 bits are too few to choose steps by",
    },
}
FOLDER, SET = "RIGPT_UPSTREAM_FOLDER", "RIGPT_UPSTREAM_SET"


class Absent:
    """Gives for a module of upstream's tests that a source distribution lacks one of empty classes."""

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.startswith("tests.") else None

    def create_module(self, spec):
        return types.ModuleType(spec.name)

    def exec_module(self, module):
        def missing(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = missing


def upstream(name: str):
    """A module of upstream's tests."""
    if "tests" not in sys.modules or not hasattr(sys.modules["tests"], "upstream"):
        package = types.ModuleType("tests")
        package.__path__, package.upstream = [str(Path(os.environ[FOLDER]) / "tests")], True
        sys.modules["tests"] = package
        sys.meta_path.append(Absent())
    __import__(f"tests.{name}")
    return sys.modules[f"tests.{name}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("-k", default="", help="only the tests that pytest finds by this")
    arguments = parser.parse_args()
    if not (arguments.folder / "tests" / "test_modeling_common.py").is_file():
        parser.error(f"{arguments.folder} holds no tests/test_modeling_common.py")
    if find_spec("parameterized") is None:
        parser.error("the package parameterized is not installed")
    failed = 0
    for name in arguments.sets:
        outcomes, reasons = run(arguments.folder, name, arguments.k)
        counts = {
            kind: list(outcomes.values()).count(kind) for kind in ("passed", "failed", "expected to fail", "skipped")
        }
        print(
            f"{name}: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()),
            *reasons,
            sep="\n    ",
            flush=True,
        )
        failed += counts["failed"]
    sys.exit(failed > 0)


def run(folder: Path, name: str, expression: str) -> tuple[dict[str, str], list[str]]:
    """The outcome of each test for a set, and the reasons of those that failed."""
    with tempfile.TemporaryDirectory() as place:
        test, report = Path(place) / "test_rigpt.py", Path(place) / "report.xml"
        # Elsewhere, as upstream's package of tests has the name of ours.
        test.symlink_to(Path(__file__).resolve())
        command = ["pytest", "-q", "-c", os.devnull, "--rootdir", place, "-p", "no:cacheprovider", "-k", expression]
        command += ["--import-mode=importlib", f"--junitxml={report}", str(test)]
        environment = {FOLDER: str(folder.resolve()), SET: name, "HF_HUB_OFFLINE": "1"}
        subprocess.run(
            [sys.executable, "-m", *command], env=os.environ | environment, stdout=subprocess.DEVNULL, cwd=place
        )
        suite = ElementTree.parse(report).getroot()[0]
    outcomes, reasons = {}, []
    for case in suite:  # one for each part of a test, too
        test, parts = case.get("name"), (*case.findall("failure"), *case.findall("error"))
        reasons += [f"{test}: {' '.join((part.get('message') or '').split())[:300]}" for part in parts]
        if parts:
            expected = any(re.match(pattern, test) for pattern in EXPECTED.get(name, ()))
            outcomes[test] = "expected to fail" if expected else "failed"
        elif case.find("skipped") is not None:
            outcomes.setdefault(test, "skipped")
        elif outcomes.get(test) not in ("failed", "expected to fail"):
            outcomes[test] = "passed"
    return outcomes, reasons


if __name__ == "__main__":
    main()
elif FOLDER in os.environ:
    import unittest

    import torch
    from transformers.models.auto import modeling_auto

    import rigpt_hf
    from rigpt_hf.configuration_rigpt import AUTO_CLASSES

    # By these tables upstream's tests find out which labels a class takes.
    for auto_class, model in AUTO_CLASSES.items():
        getattr(modeling_auto, auto_class)._model_mapping._model_mapping["rigpt"] = model
    common = upstream("test_modeling_common")
    training = upstream("test_training_mixin")

    class Tester:
        """Answers what upstream's tests ask about the model and its inputs."""

        batch_size, seq_length, is_training = 13, 7, True
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, num_labels = 99, 32, 2, 4, 3
        base_model_class = rigpt_hf.RiGPTModel
        causal_lm_class = rigpt_hf.RiGPTForCausalLM

        def get_config(self):
            return rigpt_hf.RiGPTConfig(
                vocab_size=self.vocab_size,
                hidden_size=self.hidden_size,
                num_hidden_layers=self.num_hidden_layers,
                num_attention_heads=self.num_attention_heads,
                num_key_value_heads=2,
                intermediate_size=37,
                max_position_embeddings=512,
                num_labels=self.num_labels,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                **SETS[os.environ[SET]],
            )

        def prepare_config_and_inputs_for_common(self):
            input_ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
            return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids).tril()}

    class RiGPTTest(
        common.ModelTesterMixin, common.GenerationTesterMixin, training.TrainingTesterMixin, unittest.TestCase
    ):
        """Every test that Transformers has for a causal language model."""

        model_tester = None
        all_model_classes = tuple(getattr(rigpt_hf, name) for name in AUTO_CLASSES.values())

        def setUp(self):
            self.model_tester = Tester()
