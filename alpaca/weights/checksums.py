"""SHA-256 of the files that are read, and the names of those whose sums were published."""

import hashlib
import threading
from concurrent.futures import Future

from alpaca.common.errors import UserError

# SHA256.md of github.com/ymcui/Chinese-LLaMA-Alpaca
PUBLISHED = {
    "700df0d3013b703a806d2ae7f1bfb8e59814e3d06ae78be0c66368a50059f33d": "LLaMA-7B consolidated.00.pth",
    "745bf4e29a4dd6f411e72976d92b452da1b49168a4f41c951cfcc8051823cf08": "LLaMA-13B consolidated.00.pth",
    "d5ccbcc465c71c0de439a5aeffebe8344c68a519bce70bc7f9f92654ee567085": "LLaMA-13B consolidated.01.pth",
    "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347": "LLaMA tokenizer.model",
    "e2676d4ca29ca1750f6ff203328d73b189321dc5776ceede037cbd36541d70c0": "Chinese-LLaMA tokenizer.model",
    "2d967e855b1213a439df6c8ce2791f869c84b4f3b6cfacf22b86440b8192a2f8": "Chinese-Alpaca tokenizer.model",
    "2a2c24d096f5d509f24946fdbd8c25e1ce4a0acb955902f7436d74c0c0379d86": "Chinese-LLaMA-7B adapter_model.bin",
    "8c928db86b2a0cf73f019832f921eb7e1e069ca21441b4bfa12c4381c6cc46be": "Chinese-LLaMA-Plus-7B adapter_model.bin",
    "6a4ce789d219bde122f8d9a20371937f2aa2ee86a2311d9f5e303df2e774f9fc": "Chinese-LLaMA-13B adapter_model.bin",
    "784fcff9c4bdf4e77d442a01158e121caf8fcce0f97ffb32396fe7a3617ee7e8": "Chinese-LLaMA-Plus-13B adapter_model.bin",
    "0d9b6ed8e4a7d1ae590a16c89a452a488d66ff07e45487972f61c2b6e46e36de": "Chinese-Alpaca-7B adapter_model.bin",
    "4ee0bf805c312a9a771624d481fbdb4485e1b0a70cd2a8da9f96137f177b795d": "Chinese-Alpaca-Plus-7B adapter_model.bin",
    "cb8dda3c005f3343a0740dcd7237fbb600cb14b6bff9b6f3d488c086a2f08ada": "Chinese-Alpaca-13B adapter_model.bin",
    "a1fcdcb6d7e1068f925fb36ec78632c76058ba12ba352bed4d44060b8e6f4706": "Chinese-Alpaca-Plus-13B adapter_model.bin",
    "8b8f6551d0d83f93e378622b9f8dad0bec189da6c29d8a78de493e6aee9bd35f": "merged Chinese-Alpaca-Plus-7B consolidated.00.pth",
}


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_in_background(paths):
    """{path: Future of its SHA-256}. A daemon thread, for an error elsewhere must not wait until 13 GB are hashed."""
    futures = {path: Future() for path in paths}

    def work():
        for path, future in futures.items():
            try:
                future.set_result(sha256_of(path))
            except OSError as error:
                future.set_exception(UserError(f"{path}: cannot be read ({error.strerror}); correct its disk"))

    threading.Thread(target=work, daemon=True).start()
    return futures


def print_sum(path, digest):
    """Print one sum, and what file it is if its sum was published."""
    known = PUBLISHED.get(digest)
    print(f"sha256 {digest}  {path}" + (f"（即官方公布的 {known}）" if known else ""), flush=True)
