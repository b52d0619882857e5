/* WHAT    The wire contract in C: messages generated from the .proto files beside this header, and the
 *         compiled descriptors that the reflection service hands out.
 * OWNS    Static data only.
 * THREADS Any.
 * ERRORS  None here; server/wire.h checks bytes from outside before they are unpacked.
 * LIMITS  protobuf-c neither checks UTF-8 nor keeps a NUL inside a string, and it recurses without a
 *         bound: no message of the contract is recursive, and server/wire.h checks the rest.
 * NEXT    server/server.h */
#pragma once
#include <stdint.h>

#include "choir.pb-c.h"
#include "grpc/health/v1/health.pb-c.h"
#include "grpc/reflection/v1/reflection.pb-c.h"

/* A google.protobuf.FileDescriptorSet, imports before their users. */
extern const uint8_t choir_proto_descriptors[], choir_proto_descriptors_end[];
