"""llama.cpp's server as something to compare with: next-token log-probabilities of token ids."""
import json
import math
import subprocess
import tempfile
import time
import urllib.request


def log_softmax(logits):
    most = max(logits)
    total = most + math.log(sum(math.exp(x - most) for x in logits))
    return [x - total for x in logits]


class Llama:
    def __init__(self, program, model, port=50871, arguments=()):
        self.url = f"http://127.0.0.1:{port}"
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen([program, "-m", model, "--port", str(port), "-c", "1024", *arguments],
                                        stdout=subprocess.DEVNULL, stderr=self.log)
        for _ in range(300):
            if self.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(self.url + "/health"):
                    return
            except OSError:
                time.sleep(0.1)
        self.close()
        self.log.seek(0)
        told = [line.strip() for line in self.log if "error" in line.lower()] or ["no reason told"]
        raise RuntimeError("llama-server did not start: " + told[0][:200])

    def best(self, ids, n=20, draw=None):
        """Of the next token: (id, log-probability), best first, before sampling. `draw`: the token to be drawn, since
        nothing is told of one whose character is not whole."""
        body = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": n, "ignore_eos": True}
        if draw is not None:
            body["logit_bias"] = [[draw, 100]]
        body = json.dumps(body).encode()
        request = urllib.request.Request(self.url + "/completion", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            top = json.load(answer)["completion_probabilities"][0]["top_logprobs"]
        return [(t["id"], t["logprob"]) for t in top]

    def close(self):
        self.process.kill()
        self.process.wait()
