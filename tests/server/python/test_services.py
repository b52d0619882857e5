"""ListModels, GetStats, tokens, health, reflection, keys."""
import grpc
import pytest
import trustme
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import \
    ProtoReflectionDescriptorDatabase

SERVING = health_pb2.HealthCheckResponse.SERVING
SERVICES = {"choir.v1.Choir", "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection"}


def test_models(choir, pb):
    models = choir.ListModels(pb.ListModelsRequest(), timeout=5).models
    assert len(models) == 1
    m = models[0]
    assert m.name and m.vocab > 0 and m.n_layers > 0 and m.max_tokens > 0 and len(m.digest) == 16
    assert 0 <= m.defaults.temperature <= 100 and 0 < m.defaults.top_p <= 1


def test_stats(choir, help, pb):
    list(choir.Generate(help.request(), timeout=60))
    stats = choir.GetStats(pb.GetStatsRequest(), timeout=5)
    m = stats.models[0]
    assert m.healthy and m.kv_pages > 0 and m.steps > 0 and m.output_tokens > 0 and m.done > 0
    assert stats.server.uptime_s > 0 and stats.server.calls > 0 and stats.server.resident_bytes > 0
    assert {u.what for u in stats.server.memory} >= {"weights", "KV pages", "server"}
    with pytest.raises(grpc.RpcError) as error:
        choir.GetStats(pb.GetStatsRequest(model="nobody"), timeout=5)
    assert error.value.code() == grpc.StatusCode.NOT_FOUND


def test_tokenize_round_trip(choir, pb):
    text = "Hello, \u2615 world \U0001f600!\n"
    answer = choir.Tokenize(pb.TokenizeRequest(text=text, add_special=False, with_pieces=True), timeout=5)
    assert len(answer.ids) == len(answer.pieces) > 0 and answer.max_tokens > 0
    assert choir.Detokenize(pb.DetokenizeRequest(ids=answer.ids), timeout=5).text == text
    for bad, word in ((pb.DetokenizeRequest(ids=[2**32 - 1]), "ids[0]"),):
        with pytest.raises(grpc.RpcError) as error:
            choir.Detokenize(bad, timeout=5)
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT and word in error.value.details()
    with pytest.raises(grpc.RpcError) as error:
        choir.Tokenize(pb.TokenizeRequest(), timeout=5)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert list(choir.Tokenize(pb.TokenizeRequest(text="", add_special=False), timeout=5).ids) == []


def test_health(shared, choir, pb):
    stub = health_pb2_grpc.HealthStub(shared.channel())
    name = choir.ListModels(pb.ListModelsRequest(), timeout=5).models[0].name
    for service in ("", "choir.v1.Choir", name):
        assert stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status == SERVING
    with pytest.raises(grpc.RpcError) as error:
        stub.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=5)
    assert error.value.code() == grpc.StatusCode.NOT_FOUND
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=name), timeout=5)
    assert next(watch).status == SERVING
    watch.cancel()
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="nobody"), timeout=5)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


def test_reflection_client_needs_no_proto(shared):
    channel = shared.channel()
    database = ProtoReflectionDescriptorDatabase(channel)
    assert SERVICES <= set(database.get_services())
    pool = descriptor_pool.DescriptorPool(database)
    service = pool.FindServiceByName("choir.v1.Choir")
    request_type = message_factory.GetMessageClass(service.FindMethodByName("Generate").input_type)
    event_type = message_factory.GetMessageClass(service.FindMethodByName("Generate").output_type)
    call = channel.unary_stream("/choir.v1.Choir/Generate",
                                request_serializer=request_type.SerializeToString,
                                response_deserializer=event_type.FromString)
    request = request_type(prompt="Hello")
    request.sampling.max_tokens = 4
    events = list(call(request, timeout=60))
    assert events[0].HasField("started") and events[-1].HasField("done")


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_of_every_kind(shared, version):
    method = shared.channel().stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString)
    r = reflection_pb2.ServerReflectionRequest
    asked = [
        r(list_services=""), r(file_by_filename="choir.proto"), r(file_by_filename="nothing.proto"),
        r(file_containing_symbol="choir.v1.Choir"), r(file_containing_symbol="choir.v1.Choir.Generate"),
        r(file_containing_symbol="choir.v1.Sampling.top_k"), r(file_containing_symbol="choir.v1.UP"),
        r(file_containing_symbol="choir.v1.Sampling.LogitBiasEntry"),
        r(file_containing_symbol="grpc.health.v1.HealthCheckResponse.ServingStatus"),
        r(file_containing_symbol="no.such.Thing"), r(all_extension_numbers_of_type="choir.v1.Sampling"),
        r(all_extension_numbers_of_type="no.Such"),
        r(file_containing_extension=reflection_pb2.ExtensionRequest(containing_type="choir.v1.Sampling",
                                                                    extension_number=5)),
        r(host="only"),
    ]
    answers = list(method(iter(asked), timeout=10))
    assert len(answers) == len(asked)
    kinds = [a.WhichOneof("message_response") for a in answers]
    file, error = "file_descriptor_response", "error_response"
    assert kinds == ["list_services_response", file, error, file, file, file, file, file, file, error,
                     "all_extension_numbers_response", error, error, error]
    assert [a.original_request for a in answers] == asked
    assert {s.name for s in answers[0].list_services_response.service} == SERVICES
    assert answers[2].error_response.error_code == 5 and answers[13].error_response.error_code == 3
    assert answers[10].all_extension_numbers_response.base_type_name == "choir.v1.Sampling"


def test_api_key(launch, stub, help, pb):
    server = launch("--api-key", "sesame")
    s = stub(server)
    for metadata in ((), (("authorization", "Bearer sesam"),), (("authorization", "Bearer sesamee"),),
                     (("authorization", "sesame"),), (("authorization", ""),)):
        for call in (lambda m: s.ListModels(pb.ListModelsRequest(), timeout=5, metadata=m),
                     lambda m: list(s.Generate(help.request(), timeout=5, metadata=m))):
            with pytest.raises(grpc.RpcError) as error:
                call(metadata)
            assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
    key = (("authorization", "Bearer sesame"),)
    assert s.ListModels(pb.ListModelsRequest(), timeout=5, metadata=key).models
    assert list(s.Generate(help.request(), timeout=5, metadata=key))[-1].HasField("done")
    assert server.health() == SERVING
    with pytest.raises(grpc.RpcError) as error:
        list(reflection_pb2_grpc.ServerReflectionStub(server.channel()).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5))
    assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_unix_socket(launch, rpc, pb, tmp_path):
    path = tmp_path / "choir.sock"
    launch("--listen", f"unix:{path}")
    with grpc.insecure_channel(f"unix:{path}") as channel:
        assert rpc.ChoirStub(channel).ListModels(pb.ListModelsRequest(), timeout=5).models


def test_taken_port_is_refused(launch, shared):
    second = launch("--listen", shared.target, wait=False)
    assert second.wait_exit() == 1
    assert shared.target in second.process.stdout.read()


def test_tls(launch, rpc, pb, help, tmp_path):
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    roots, chain, key = (tmp_path / name for name in ("roots.pem", "chain.pem", "key.pem"))
    authority.cert_pem.write_to_path(roots)
    certificate.private_key_pem.write_to_path(key)
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(chain, append=True)
    server = launch("--tls-cert", str(chain), "--tls-key", str(key), wait=False)
    credentials = grpc.ssl_channel_credentials(roots.read_bytes())
    with grpc.secure_channel(server.target, credentials) as channel:
        grpc.channel_ready_future(channel).result(timeout=60)
        assert list(rpc.ChoirStub(channel).Generate(help.request(), timeout=60))[-1].HasField("done")
    strangers = (grpc.ssl_channel_credentials(trustme.CA().cert_pem.bytes()), None)
    for stranger in strangers:
        with grpc.secure_channel(server.target, stranger) if stranger else \
                grpc.insecure_channel(server.target) as channel:
            with pytest.raises(grpc.RpcError) as error:
                rpc.ChoirStub(channel).ListModels(pb.ListModelsRequest(), timeout=5)
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE


def test_bad_tls_files_are_refused(launch, tmp_path):
    bad = tmp_path / "bad.pem"
    bad.write_text("-----BEGIN NONSENSE-----\n")
    server = launch("--tls-cert", str(bad), "--tls-key", str(bad), wait=False)
    assert server.wait_exit() == 1
    assert "TLS" in server.process.stdout.read()
