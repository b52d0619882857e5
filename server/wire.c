#include "server/wire.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { VARINT = 0, FIXED64 = 1, LENGTH = 2, FIXED32 = 5 };

static bool take_varint(const uint8_t **at, const uint8_t *end, uint64_t *out)
{
    uint64_t value = 0;
    const uint8_t *p = *at;
    for (int shift = 0; shift < 70 && p < end; shift += 7) {
        uint8_t byte = *p++;
        if (shift == 63 && byte > 1) return false;
        value |= (uint64_t)(byte & 0x7F) << shift;
        if (byte < 0x80) {
            *out = value;
            *at = p;
            return true;
        }
    }
    return false;
}

static uint64_t little_endian(const uint8_t *p, int bytes)
{
    uint64_t value = 0;
    for (int i = 0; i < bytes; i++) value |= (uint64_t)p[i] << (8 * i);
    return value;
}

/* Keys and lengths: at most five bytes, as protobuf-c wants them. */
static bool take_short_varint(const uint8_t **at, const uint8_t *end, uint64_t *out)
{
    return take_varint(at, end - *at > 5 ? *at + 5 : end, out) && *out <= UINT32_MAX;
}

bool choir_wire_next(const uint8_t **at, const uint8_t *end, choir_wire_field *out)
{
    const uint8_t *p = *at;
    uint64_t key, length;
    if (p >= end || !take_short_varint(&p, end, &key) || key >> 3 == 0) return false;
    *out = (choir_wire_field){.number = (uint32_t)(key >> 3), .type = (uint32_t)(key & 7)};
    switch (out->type) {
    case VARINT:
        if (!take_varint(&p, end, &out->value)) return false;
        break;
    case FIXED64:
    case FIXED32: {
        int width = out->type == FIXED64 ? 8 : 4;
        if (end - p < width) return false;
        out->value = little_endian(p, width);
        p += width;
        break;
    }
    case LENGTH:
        if (!take_short_varint(&p, end, &length) || length > (size_t)(end - p)) return false;
        out->data = p;
        out->bytes = (size_t)length;
        p += length;
        break;
    default:
        return false; /* groups are of proto2 only */
    }
    *at = p;
    return true;
}

size_t choir_wire_put_varint(uint8_t *out, uint64_t value)
{
    size_t n = 0;
    do {
        uint8_t byte = (uint8_t)(value & 0x7F);
        value >>= 7;
        if (out != NULL) out[n] = byte | (value != 0 ? 0x80 : 0);
        n++;
    } while (value != 0);
    return n;
}

size_t choir_wire_put_header(uint8_t *out, uint32_t field, size_t bytes)
{
    size_t n = choir_wire_put_varint(out, (uint64_t)field << 3 | LENGTH);
    return n + choir_wire_put_varint(out == NULL ? NULL : out + n, bytes);
}

/* The well-formed byte sequences of Unicode's table 3-7. */
bool choir_utf8_valid(const char *text, size_t bytes)
{
    const uint8_t *p = (const uint8_t *)text, *end = p + bytes;
    while (p < end) {
        uint64_t eight;
        while (end - p >= 8 && (memcpy(&eight, p, 8), (eight & 0x8080808080808080u) == 0)) p += 8;
        if (p == end) break;
        uint8_t lead = *p++;
        if (lead < 0x80) continue;
        int more = lead >= 0xF0 ? 3 : lead >= 0xE0 ? 2 : 1;
        if (lead < 0xC2 || lead > 0xF4 || end - p < more) return false;
        uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
        uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
        if (p[0] < low || p[0] > high) return false;
        for (int i = 1; i < more; i++)
            if ((p[i] & 0xC0) != 0x80) return false;
        p += more;
    }
    return true;
}

/* Where the walk is, for sentences: a chain of fields from the outermost message inwards. */
typedef struct place {
    const struct place *outer;
    const char *field;
    int64_t index; /* in a repeated field; -1: none */
} place;

typedef struct walk {
    const choir_wire_rule *rules;
    size_t n_rules;
    uint32_t n_fields;
    const char *type;
} walk;

/* "chat.messages[3].content" */
static size_t write_place(const place *p, char *out, size_t room)
{
    size_t n = 0;
    if (p->outer != NULL) {
        n = write_place(p->outer, out, room);
        if (n + 1 < room) out[n++] = '.';
    }
    int wrote = p->index < 0 ? snprintf(out + n, room - n, "%s", p->field)
                             : snprintf(out + n, room - n, "%s[%" PRId64 "]", p->field, p->index);
    n += (size_t)wrote;
    return n < room ? n : room - 1;
}

static choir_status refuse(const place *p, const char *why)
{
    char name[256];
    write_place(p, name, sizeof name);
    return choir_fail(CHOIR_E_INVALID, "%s %s", name, why);
}

static const choir_wire_rule *rule_of(const walk *w, const ProtobufCMessageDescriptor *type,
                                      const char *field)
{
    for (size_t i = 0; i < w->n_rules; i++)
        if (w->rules[i].message == type && strcmp(w->rules[i].field, field) == 0)
            return &w->rules[i];
    return NULL;
}

static const ProtobufCFieldDescriptor *field_of(const ProtobufCMessageDescriptor *type,
                                                uint32_t number)
{
    for (unsigned i = 0; i < type->n_fields; i++)
        if (type->fields[i].id == number) return &type->fields[i];
    return NULL;
}

static uint32_t wire_type_of(ProtobufCType type)
{
    switch (type) {
    case PROTOBUF_C_TYPE_STRING:
    case PROTOBUF_C_TYPE_BYTES:
    case PROTOBUF_C_TYPE_MESSAGE:
        return LENGTH;
    case PROTOBUF_C_TYPE_FLOAT:
    case PROTOBUF_C_TYPE_FIXED32:
    case PROTOBUF_C_TYPE_SFIXED32:
        return FIXED32;
    case PROTOBUF_C_TYPE_DOUBLE:
    case PROTOBUF_C_TYPE_FIXED64:
    case PROTOBUF_C_TYPE_SFIXED64:
        return FIXED64;
    default:
        return VARINT;
    }
}

/* The elements of a packed field; false when its bytes do not divide into them. */
static bool count_packed(uint32_t wire_type, const choir_wire_field *field, uint64_t *n)
{
    if (wire_type != VARINT) {
        size_t width = wire_type == FIXED64 ? 8 : 4;
        *n = field->bytes / width;
        return field->bytes % width == 0;
    }
    const uint8_t *at = field->data, *end = at + field->bytes;
    uint64_t value;
    for (*n = 0; at < end; ++*n)
        if (!take_varint(&at, end, &value)) return false;
    return true;
}

static choir_status check_text(const choir_wire_field *field, const place *p)
{
    if (memchr(field->data, '\0', field->bytes) != NULL)
        return refuse(p, "contains a NUL; text is UTF-8 without NUL");
    if (!choir_utf8_valid((const char *)field->data, field->bytes))
        return refuse(p, "is not valid UTF-8");
    return CHOIR_OK;
}

static choir_status check_message(walk *w, const ProtobufCMessageDescriptor *type,
                                  const uint8_t *data, size_t bytes, const place *outer, int depth);

/* A length-delimited value of a known field: text, bytes or a message. */
static choir_status check_value(walk *w, const ProtobufCMessageDescriptor *type,
                                const ProtobufCFieldDescriptor *known,
                                const choir_wire_field *field, const place *p, int depth)
{
    if (known->type == PROTOBUF_C_TYPE_MESSAGE)
        return check_message(w, known->descriptor, field->data, field->bytes, p, depth + 1);
    const choir_wire_rule *rule = rule_of(w, type, known->name);
    if (rule != NULL && rule->max_bytes != 0 && field->bytes > rule->max_bytes) {
        char why[96];
        snprintf(why, sizeof why, "has %zu bytes; the limit is %u", field->bytes, rule->max_bytes);
        return refuse(p, why);
    }
    if (known->type == PROTOBUF_C_TYPE_STRING && w->rules != NULL) return check_text(field, p);
    return CHOIR_OK;
}

static choir_status check_field(walk *w, const ProtobufCMessageDescriptor *type,
                                const choir_wire_field *field, uint64_t *counts, const place *outer,
                                int depth)
{
    const ProtobufCFieldDescriptor *known = field_of(type, field->number);
    if (known == NULL) return CHOIR_OK;
    bool repeated = known->label == PROTOBUF_C_LABEL_REPEATED;
    uint32_t wire_type = wire_type_of(known->type);
    uint64_t *count = &counts[known - type->fields], fresh = 1;
    bool packed = repeated && wire_type != LENGTH && field->type == LENGTH;
    place here = {outer, known->name, repeated && !packed ? (int64_t)*count : -1};
    if (!packed && field->type != wire_type) return refuse(&here, "has the wrong wire type");
    if (packed && !count_packed(wire_type, field, &fresh))
        return refuse(&here, "is not well-formed");
    *count += fresh;
    here.index = -1;
    /* protobuf-c would merge them, field by field; nobody sends that in good faith. */
    if (!repeated && known->type == PROTOBUF_C_TYPE_MESSAGE && *count > 1)
        return refuse(&here, "appears twice");
    const choir_wire_rule *rule = rule_of(w, type, known->name);
    if (rule != NULL && rule->max_count != 0 && *count > rule->max_count) {
        char why[96];
        snprintf(why, sizeof why, "has more than %u entries, the limit", rule->max_count);
        return refuse(&here, why);
    }
    if (repeated) here.index = (int64_t)*count - 1;
    return wire_type == LENGTH ? check_value(w, type, known, field, &here, depth) : CHOIR_OK;
}

static choir_status check_message(walk *w, const ProtobufCMessageDescriptor *type,
                                  const uint8_t *data, size_t bytes, const place *outer, int depth)
{
    CHOIR_ASSERT(type->n_fields <= CHOIR_WIRE_FIELDS_OF_MESSAGE);
    uint64_t counts[CHOIR_WIRE_FIELDS_OF_MESSAGE] = {0};
    const place root = {NULL, w->type, -1};
    if (depth > CHOIR_WIRE_MAX_DEPTH)
        return refuse(outer, "is nested deeper than 16 messages, the limit");
    const uint8_t *at = data, *end = data + bytes;
    choir_wire_field field;
    while (choir_wire_next(&at, end, &field)) {
        if (++w->n_fields > CHOIR_WIRE_MAX_FIELDS)
            return choir_fail(CHOIR_E_INVALID, "%s has more than %d fields, the limit", w->type,
                              CHOIR_WIRE_MAX_FIELDS);
        CHOIR_TRY(check_field(w, type, &field, counts, outer, depth));
    }
    if (at != end) return refuse(outer != NULL ? outer : &root, "is not a well-formed message");
    return CHOIR_OK;
}

choir_status choir_wire_check(const ProtobufCMessageDescriptor *type, const choir_wire_rule *rules,
                              size_t n_rules, const uint8_t *data, size_t bytes)
{
    walk w = {.rules = rules, .n_rules = n_rules, .type = type->short_name};
    return check_message(&w, type, data, bytes, NULL, 1);
}
