/* A tenant's part of the journal as JSON lines: what somebody may ask to see of what is kept of
 * him. Numbers of 64 bits that count nothing are hexadecimal text, since JSON's readers have 53. */
#include "router/learn/journal_state.h"

#include "router/learn/json.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const signals[CHOIR_N_SIGNALS] = {
    [CHOIR_SIGNAL_THUMB] = "thumb",
    [CHOIR_SIGNAL_SCORE] = "score",
    [CHOIR_SIGNAL_PREFERRED] = "preferred",
    [CHOIR_SIGNAL_CORRECTION] = "correction",
};

typedef struct exporter {
    bool (*write)(void *user, const char *line, size_t bytes);
    void *user;
    choir_status status;
} exporter;

static json_t *features_of(const choir_decision *d)
{
    json_t *list = json_array();
    for (uint32_t i = 0; i < d->n_features; i++)
        json_array_append_new(list, json_real((double)d->features[i]));
    return list;
}

static json_t *candidates_of(const choir_decision *d)
{
    json_t *list = json_array();
    for (uint32_t i = 0; i < d->n_candidates; i++) {
        const choir_candidate *c = &d->candidates[i];
        json_array_append_new(list,
                              json_pack("{s:s, s:o, s:f}", "name", c->name, "digest",
                                        json_of_bits(c->digest), "probability", c->probability));
    }
    return list;
}

static json_t *routes_of(const choir_decision *d)
{
    static const char digits[] = "0123456789abcdef";
    char *text = choir_alloc(CHOIR_MEM_LEARNING, 2 * d->routes_bytes + 1);
    if (text == NULL) return NULL;
    for (size_t i = 0; i < d->routes_bytes; i++) {
        uint8_t byte = ((const uint8_t *)d->routes)[i];
        text[2 * i] = digits[byte >> 4];
        text[2 * i + 1] = digits[byte & 15];
    }
    json_t *made = json_stringn(text, 2 * d->routes_bytes);
    choir_free(text);
    return made;
}

static json_t *decision_line(const choir_journal_entry *e)
{
    const choir_decision *d = &e->decision;
    json_t *line =
        json_pack("{s:I, s:s, s:s, s:s, s:I, s:o, s:o, s:i, s:b, s:I, s:I, s:o}", "sequence",
                  (json_int_t)e->sequence, "kind", "decision", "request_id", d->request_id, "model",
                  d->model, "time_ms", (json_int_t)d->time_ms, "features", features_of(d),
                  "candidates", candidates_of(d), "chosen", (int)d->chosen, "explored",
                  (int)d->explored, "champion", (json_int_t)d->champion, "challenger",
                  (json_int_t)d->challenger, "seed", json_of_bits(d->seed));
    if (line != NULL && d->routes != NULL &&
        json_object_set_new(line, "routes", routes_of(d)) != 0) {
        json_decref(line);
        return NULL;
    }
    return line;
}

static json_t *feedback_line(const choir_journal_entry *e)
{
    const choir_feedback *f = &e->feedback;
    json_t *line =
        json_pack("{s:I, s:s, s:s, s:s, s:I, s:s, s:I}", "sequence", (json_int_t)e->sequence,
                  "kind", "feedback", "request_id", f->request_id, "model", e->decision.model,
                  "time_ms", (json_int_t)f->time_ms, "signal", signals[f->signal],
                  "decision_sequence", (json_int_t)e->decision_sequence);
    json_t *said = f->text != NULL ? json_string(f->text) : json_real((double)f->value);
    if (line != NULL && json_object_set_new(line, f->text != NULL ? "text" : "value", said) != 0) {
        json_decref(line);
        return NULL;
    }
    return line;
}

static bool write_entry(void *user, const choir_journal_entry *entry)
{
    exporter *x = user;
    json_t *line = entry->is_feedback ? feedback_line(entry) : decision_line(entry);
    char *text = line != NULL ? json_dumps(line, JSON_COMPACT) : NULL;
    json_decref(line);
    if (text == NULL) {
        x->status = choir_fail(CHOIR_E_NO_MEMORY, "no memory to export the journal");
        return false;
    }
    size_t bytes = strlen(text);
    text[bytes] = '\n'; /* in the NUL's place: the line is told with its length */
    bool on = x->write(x->user, text, bytes + 1);
    free(text);
    return on;
}

static choir_status export_tenant(journal_db *db, const char *tenant, exporter *x)
{
    uint64_t last;
    journal_call call = journal_begin_call(db, SQL_READ_TENANT);
    journal_put_text(&call, tenant);
    CHOIR_TRY(journal_each_entry(&call, 0, write_entry, x, &last));
    return x->status;
}

choir_status choir_journal_export(choir_journal *journal, const char *tenant,
                                  bool (*write)(void *user, const char *line, size_t bytes),
                                  void *user)
{
    exporter x = {.write = write, .user = user};
    journal_db db;
    CHOIR_TRY(journal_begin_read(journal, &db));
    return journal_end_read(journal, &db, export_tenant(&db, tenant, &x));
}
