#include "server/reflection.h"

#include "base/memory.h"
#include "proto/proto.h"
#include "server/message.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Field numbers of google/protobuf/descriptor.proto. */
enum {
    SET_FILE = 1,
    FILE_NAME = 1,
    FILE_PACKAGE = 2,
    FILE_DEPENDENCY = 3,
    FILE_MESSAGE = 4,
    FILE_ENUM = 5,
    FILE_SERVICE = 6,
    MESSAGE_NAME = 1,
    MESSAGE_FIELD = 2,
    MESSAGE_NESTED = 3,
    MESSAGE_ENUM = 4,
    MESSAGE_ONEOF = 8,
    ENUM_NAME = 1,
    ENUM_VALUE = 2,
    SERVICE_NAME = 1,
    SERVICE_METHOD = 2,
    NAME = 1, /* of fields, values, oneofs and methods */
};

enum { MAX_FILES = 64, MAX_NAME = 256, GRPC_INVALID_ARGUMENT = 3, GRPC_NOT_FOUND = 5 };

typedef enum symbol_kind { SYMBOL_OTHER, SYMBOL_MESSAGE, SYMBOL_SERVICE } symbol_kind;

typedef struct symbol {
    char *name; /* "choir.v1.Choir.Generate" */
    uint32_t file;
    symbol_kind kind;
} symbol;

typedef struct file {
    const uint8_t *data;
    size_t bytes;
    char name[MAX_NAME];
} file;

struct choir_reflection {
    file files[MAX_FILES];
    uint32_t n_files, n_symbols, symbols_room;
    symbol *symbols; /* sorted by name once made */
};

static bool copy_name(const choir_wire_field *field, char *out)
{
    if (field->bytes >= MAX_NAME) return false;
    memcpy(out, field->data, field->bytes);
    out[field->bytes] = '\0';
    return true;
}

/* The first field `number` of a descriptor as a string; "" when it has none. */
static void find_name(const uint8_t *data, size_t bytes, uint32_t number, char *out)
{
    const uint8_t *at = data;
    choir_wire_field field;
    out[0] = '\0';
    while (choir_wire_next(&at, data + bytes, &field))
        if (field.number == number && field.type == 2 && copy_name(&field, out)) return;
}

static choir_status add_symbol(choir_reflection *r, const char *name, symbol_kind kind)
{
    if (r->n_symbols == r->symbols_room) {
        uint32_t room = r->symbols_room == 0 ? 256 : 2 * r->symbols_room;
        symbol *grown = choir_realloc(CHOIR_MEM_SERVER, r->symbols, room * sizeof *grown);
        if (grown == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for reflection");
        r->symbols = grown;
        r->symbols_room = room;
    }
    char *copy = choir_strdup(CHOIR_MEM_SERVER, name);
    if (copy == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for reflection");
    r->symbols[r->n_symbols++] = (symbol){copy, r->n_files - 1, kind};
    return CHOIR_OK;
}

static void join(char *out, const char *scope, const char *name)
{
    snprintf(out, 2 * MAX_NAME, "%.*s%s%.*s", MAX_NAME - 1, scope, scope[0] ? "." : "",
             MAX_NAME - 1, name);
}

/* Adds "scope.name" for a declaration, and for its parts, whose names lie in the fields `parts` (a
 * bit each). Enum values are siblings of their enum, everything else is its child. */
static choir_status add_declaration(choir_reflection *r, const choir_wire_field *declaration,
                                    const char *scope, uint32_t parts, symbol_kind kind,
                                    bool siblings, char *full)
{
    char name[MAX_NAME], part[2 * MAX_NAME];
    find_name(declaration->data, declaration->bytes, NAME, name);
    join(full, scope, name);
    CHOIR_TRY(add_symbol(r, full, kind));
    const uint8_t *at = declaration->data, *end = at + declaration->bytes;
    choir_wire_field field;
    while (choir_wire_next(&at, end, &field)) {
        if (field.type != 2 || field.number > 31 || (parts >> field.number & 1) == 0) continue;
        find_name(field.data, field.bytes, NAME, name);
        join(part, siblings ? scope : full, name);
        CHOIR_TRY(add_symbol(r, part, SYMBOL_OTHER));
    }
    return CHOIR_OK;
}

static choir_status add_enum(choir_reflection *r, const choir_wire_field *field, const char *scope)
{
    char full[2 * MAX_NAME];
    return add_declaration(r, field, scope, 1u << ENUM_VALUE, SYMBOL_OTHER, true, full);
}

/* Embedded data of our own: its nesting is that of the .proto files. */
static choir_status add_message(choir_reflection *r, const choir_wire_field *message,
                                const char *scope)
{
    char full[2 * MAX_NAME];
    uint32_t parts = 1u << MESSAGE_FIELD | 1u << MESSAGE_ONEOF;
    CHOIR_TRY(add_declaration(r, message, scope, parts, SYMBOL_MESSAGE, false, full));
    const uint8_t *at = message->data, *end = at + message->bytes;
    choir_wire_field field;
    while (choir_wire_next(&at, end, &field)) {
        if (field.number == MESSAGE_NESTED) CHOIR_TRY(add_message(r, &field, full));
        if (field.number == MESSAGE_ENUM) CHOIR_TRY(add_enum(r, &field, full));
    }
    return CHOIR_OK;
}

static choir_status add_file(choir_reflection *r, const uint8_t *data, size_t bytes)
{
    if (r->n_files == MAX_FILES)
        return choir_fail(CHOIR_E_INTERNAL, "more than %d .proto files", MAX_FILES);
    file *f = &r->files[r->n_files++];
    *f = (file){.data = data, .bytes = bytes};
    char package[MAX_NAME], full[2 * MAX_NAME];
    find_name(data, bytes, FILE_NAME, f->name);
    find_name(data, bytes, FILE_PACKAGE, package);
    const uint8_t *at = data;
    choir_wire_field field;
    while (choir_wire_next(&at, data + bytes, &field)) {
        if (field.number == FILE_MESSAGE) CHOIR_TRY(add_message(r, &field, package));
        if (field.number == FILE_ENUM) CHOIR_TRY(add_enum(r, &field, package));
        if (field.number == FILE_SERVICE)
            CHOIR_TRY(add_declaration(r, &field, package, 1u << SERVICE_METHOD, SYMBOL_SERVICE,
                                      false, full));
    }
    return CHOIR_OK;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const symbol *)a)->name, ((const symbol *)b)->name);
}

choir_status choir_reflection_create(const uint8_t *set, size_t bytes, choir_reflection **out)
{
    choir_reflection *r = choir_calloc(CHOIR_MEM_SERVER, 1, sizeof *r);
    if (r == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for reflection");
    const uint8_t *at = set;
    choir_wire_field field;
    choir_status status = CHOIR_OK;
    while (status == CHOIR_OK && choir_wire_next(&at, set + bytes, &field))
        if (field.number == SET_FILE) status = add_file(r, field.data, field.bytes);
    if (status == CHOIR_OK && (at != set + bytes || r->n_symbols == 0))
        status = choir_fail(CHOIR_E_INTERNAL, "the embedded descriptors are damaged");
    if (status != CHOIR_OK) {
        choir_reflection_destroy(r);
        return status;
    }
    qsort(r->symbols, r->n_symbols, sizeof *r->symbols, by_name);
    *out = r;
    return CHOIR_OK;
}

void choir_reflection_destroy(choir_reflection *r)
{
    if (r == NULL) return;
    for (uint32_t i = 0; i < r->n_symbols; i++) choir_free(r->symbols[i].name);
    choir_free(r->symbols);
    choir_free(r);
}

static const symbol *find_symbol(const choir_reflection *r, const char *name)
{
    symbol key = {.name = (char *)name};
    return bsearch(&key, r->symbols, r->n_symbols, sizeof key, by_name);
}

static int find_file(const choir_reflection *r, const char *name)
{
    for (uint32_t i = 0; i < r->n_files; i++)
        if (strcmp(r->files[i].name, name) == 0) return (int)i;
    return -1;
}

/* What one answer is built from; the response points into it. */
typedef struct answer {
    Grpc__Reflection__V1__ServerReflectionResponse response;
    Grpc__Reflection__V1__FileDescriptorResponse files;
    ProtobufCBinaryData file_bytes[MAX_FILES];
    bool taken[MAX_FILES];
    Grpc__Reflection__V1__ExtensionNumberResponse extensions;
    Grpc__Reflection__V1__ListServiceResponse services;
    Grpc__Reflection__V1__ServiceResponse service[MAX_FILES];
    Grpc__Reflection__V1__ServiceResponse *service_list[MAX_FILES];
    Grpc__Reflection__V1__ErrorResponse error;
    char message[2 * MAX_NAME];
} answer;

/* The file, then what it imports, each once. */
static void answer_file(const choir_reflection *r, uint32_t index, answer *a)
{
    if (a->taken[index]) return;
    a->taken[index] = true;
    const file *f = &r->files[index];
    a->file_bytes[a->files.n_file_descriptor_proto++] =
        (ProtobufCBinaryData){f->bytes, (uint8_t *)f->data};
    const uint8_t *at = f->data;
    choir_wire_field field;
    char name[MAX_NAME];
    while (choir_wire_next(&at, f->data + f->bytes, &field)) {
        if (field.number != FILE_DEPENDENCY || !copy_name(&field, name)) continue;
        int import = find_file(r, name);
        if (import >= 0) answer_file(r, (uint32_t)import, a);
    }
}

static void answer_with_file(const choir_reflection *r, uint32_t index, answer *a)
{
    grpc__reflection__v1__file_descriptor_response__init(&a->files);
    a->files.file_descriptor_proto = a->file_bytes;
    answer_file(r, index, a);
    a->response.message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_FILE_DESCRIPTOR_RESPONSE;
    a->response.file_descriptor_response = &a->files;
}

static void answer_with_error(answer *a, int code, const char *what, const char *name)
{
    grpc__reflection__v1__error_response__init(&a->error);
    snprintf(a->message, sizeof a->message, "%s%.*s", what, MAX_NAME, name);
    /* A cut inside a character would make the string invalid. */
    size_t n = strlen(a->message);
    while (!choir_utf8_valid(a->message, n)) n--;
    a->message[n] = '\0';
    a->error.error_code = code;
    a->error.error_message = a->message;
    a->response.message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ERROR_RESPONSE;
    a->response.error_response = &a->error;
}

static void answer_with_services(const choir_reflection *r, answer *a)
{
    grpc__reflection__v1__list_service_response__init(&a->services);
    a->services.service = a->service_list;
    for (uint32_t i = 0; i < r->n_symbols && a->services.n_service < MAX_FILES; i++) {
        if (r->symbols[i].kind != SYMBOL_SERVICE) continue;
        Grpc__Reflection__V1__ServiceResponse *s = &a->service[a->services.n_service];
        grpc__reflection__v1__service_response__init(s);
        s->name = r->symbols[i].name;
        a->service_list[a->services.n_service++] = s;
    }
    a->response.message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_LIST_SERVICES_RESPONSE;
    a->response.list_services_response = &a->services;
}

/* None of Choir's messages can be extended: a known message has no extension numbers. */
static void answer_with_extensions(const choir_reflection *r, char *type, answer *a)
{
    const symbol *s = find_symbol(r, type);
    if (s == NULL || s->kind != SYMBOL_MESSAGE) {
        answer_with_error(a, GRPC_NOT_FOUND, "no such message: ", type);
        return;
    }
    grpc__reflection__v1__extension_number_response__init(&a->extensions);
    a->extensions.base_type_name = type;
    a->response.message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ALL_EXTENSION_NUMBERS_RESPONSE;
    a->response.all_extension_numbers_response = &a->extensions;
}

static void fill(const choir_reflection *r, Grpc__Reflection__V1__ServerReflectionRequest *request,
                 answer *a)
{
    grpc__reflection__v1__server_reflection_response__init(&a->response);
    a->response.valid_host = request->host;
    a->response.original_request = request;
    switch (request->message_request_case) {
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_BY_FILENAME: {
        int index = find_file(r, request->file_by_filename);
        if (index >= 0)
            answer_with_file(r, (uint32_t)index, a);
        else
            answer_with_error(a, GRPC_NOT_FOUND, "no such file: ", request->file_by_filename);
        break;
    }
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_SYMBOL: {
        const symbol *s = find_symbol(r, request->file_containing_symbol);
        if (s != NULL)
            answer_with_file(r, s->file, a);
        else
            answer_with_error(a, GRPC_NOT_FOUND,
                              "no such symbol: ", request->file_containing_symbol);
        break;
    }
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_EXTENSION:
        answer_with_error(a, GRPC_NOT_FOUND, "no such extension of ",
                          request->file_containing_extension->containing_type);
        break;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_ALL_EXTENSION_NUMBERS_OF_TYPE:
        answer_with_extensions(r, request->all_extension_numbers_of_type, a);
        break;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_LIST_SERVICES:
        answer_with_services(r, a);
        break;
    default:
        answer_with_error(a, GRPC_INVALID_ARGUMENT, "the request asks for nothing", "");
        break;
    }
}

choir_status choir_reflection_answer(const choir_reflection *r, const uint8_t *request,
                                     size_t bytes, uint8_t **out, size_t *out_bytes)
{
    static const choir_wire_rule rules[] = {
        {&grpc__reflection__v1__server_reflection_request__descriptor, "host", 0, 256},
        {&grpc__reflection__v1__server_reflection_request__descriptor, "file_by_filename", 0, 1024},
        {&grpc__reflection__v1__server_reflection_request__descriptor, "file_containing_symbol", 0,
         1024},
        {&grpc__reflection__v1__server_reflection_request__descriptor,
         "all_extension_numbers_of_type", 0, 1024},
        {&grpc__reflection__v1__extension_request__descriptor, "containing_type", 0, 1024},
    };
    ProtobufCMessage *read;
    CHOIR_TRY(choir_message_read(&grpc__reflection__v1__server_reflection_request__descriptor,
                                 rules, sizeof rules / sizeof *rules, request, bytes, &read));
    answer a = {0};
    fill(r, (Grpc__Reflection__V1__ServerReflectionRequest *)read, &a);
    size_t n = protobuf_c_message_get_packed_size(&a.response.base);
    uint8_t *packed = choir_alloc(CHOIR_MEM_REQUESTS, n + 1);
    if (packed != NULL) protobuf_c_message_pack(&a.response.base, packed);
    choir_message_free(read);
    if (packed == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a reflection answer");
    *out = packed;
    *out_bytes = n;
    return CHOIR_OK;
}
