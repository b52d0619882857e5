"""Writes the seeds of tests/fuzz/request_fuzz.c. Needs the Python stubs of proto/choir.proto on its path:
    python -m grpc_tools.protoc -Iproto --python_out=/tmp/stubs choir.proto
    PYTHONPATH=/tmp/stubs python tests/server/make_seeds.py"""
import pathlib

import choir_pb2 as pb

folder = pathlib.Path(__file__).resolve().parent.parent / "fuzz/seeds/request_fuzz"
folder.mkdir(parents=True, exist_ok=True)
sampling = pb.Sampling(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.1,
                       presence_penalty=0.1, frequency_penalty=0.2, seed=7, max_tokens=9, min_tokens=2,
                       stop=["a", "\u00e9"], stop_token_ids=[1, 2], ignore_eos=True,
                       logit_bias={3: 1.5, 4: -2}, logprobs=2, n=2, skip_special_tokens=False)
chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi"), pb.ChatMessage(role="system")],
               add_generation_prompt=False, tools_json="[{}]", variables_json='{"a": [1]}')
seeds = {
    "tokens": pb.GenerateRequest(request_id="r", tokens=pb.TokenList(ids=[1, 200, 299]), sampling=sampling,
                                 routing=pb.Routing(no_explore=True), priority=-5),
    "chat": pb.GenerateRequest(model="fuzz", chat=chat),
    "adapter": pb.GenerateRequest(tokens=pb.TokenList(ids=[5]), adapter="org/french@2"),
    "mixed": pb.GenerateRequest(tokens=pb.TokenList(ids=[5, 6]), mix=[
        pb.AdapterWeight(adapter=f"a{i}", weight=w) for i, w in enumerate((-8, 8, 0, 0.5, 1, float("nan"), 2, 3))]),
    "mix": pb.GenerateRequest(prompt="x", mix=[pb.AdapterWeight(adapter="a", weight=0.5)], auto_adapter=True,
                              ensemble="e"),
}
seeds["load"] = pb.LoadAdapterRequest(name="org/french@2", path="a/../b", model="fuzz", pin=True, replace=True)
seeds["list"] = pb.ListAdaptersRequest(model="fuzz", limit=7, after="x")
for name, message in seeds.items():
    (folder / name).write_bytes(message.SerializeToString())
(folder / "symbol").write_bytes(b"\x22\x0echoir.v1.Choir")
