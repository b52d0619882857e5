/* WHAT    One render: the interpreter's state, calls, and the tables of filters, tests, methods and
 *         functions.
 * OWNS    The render's pool and output.
 * THREADS One thread per render.
 * ERRORS  CHOIR_E_INVALID "line N: …"; CHOIR_E_FULL for limits.
 * LIMITS  Below.
 * NEXT    engine/chat_template.h */
#pragma once
#include "engine/chat_template_text.h"
#include "engine/chat_template_tree.h"
#include <jansson.h>

#define TEMPLATE_MAX_SOURCE      ((size_t)1 << 20)
#define TEMPLATE_MAX_STEPS       4000000
#define TEMPLATE_MAX_OUTPUT      ((size_t)16 << 20)
#define TEMPLATE_MAX_VALUES      ((size_t)64 << 20)
#define TEMPLATE_MAX_TREE        ((size_t)256 << 20)
#define TEMPLATE_MAX_DEPTH       1200 /* nested evaluations, macros included */
#define TEMPLATE_MAX_MACROS      100
#define TEMPLATE_MAX_VALUE_DEPTH 200
#define TEMPLATE_MAX_RANGE       100000
#define TEMPLATE_STEP_BYTES      256 /* text handled for one step */

typedef struct template_binding {
    const template_string *name; /* interned */
    template_value value;
} template_binding;

typedef struct template_frame {
    struct template_frame *parent;
    template_binding *items;
    size_t n, capacity;
    bool captured; /* a macro made here still reads it */
} template_frame;

typedef struct template_loop {
    template_iterator it;
    const template_node *test, *target;
    template_frame *outer;
    template_value of; /* what is looped over, for its length */
    template_value before, current, after, changed;
    int64_t index0, length; /* length < 0: not known yet */
} template_loop;

typedef struct template_macro {
    const template_node *node;
    template_frame *frame;
} template_macro;

typedef struct template_arguments {
    template_value *positional;
    size_t n;
    const template_string **names;
    template_value *named;
    size_t n_named;
} template_arguments;

/* A function of Python or Jinja. `parameters` names its arguments in order, those with ? may be
 * left out ("value d? attribute?"); "*" takes whatever comes, unbound. Slots not given are MISSING.
 */
#define TEMPLATE_MAX_SLOTS 8
typedef struct template_builtin {
    const char *name;
    const char *parameters;
    choir_status (*call)(template_render *r, template_value *slots, const template_arguments *all,
                         template_value *out);
} template_builtin;

/* A generator: what it filters, and how the next item comes out of it. */
typedef struct template_lazy {
    choir_status (*next)(template_render *r, struct template_lazy *lazy, template_value *out,
                         bool *found);
    const template_builtin *filter;
    template_value slots[TEMPLATE_MAX_SLOTS];
    template_arguments arguments;
    template_iterator source;
    bool begun, done;
} template_lazy;
choir_status template_lazy_next(template_render *r, template_lazy *lazy, template_value *out,
                                bool *found);

typedef struct template_method {
    const template_builtin *function;
    template_value self;
} template_method;

typedef enum template_flow { TEMPLATE_ON, TEMPLATE_BREAK, TEMPLATE_CONTINUE } template_flow;

struct template_render {
    template_pool pool;
    const template_tree *tree;
    const json_t *variables;
    int64_t now_s;
    int64_t steps_left;
    uint32_t line;
    int depth, macros, value_depth;
    template_flow flow;
    template_text *out;
    template_frame *frame;
    template_frame globals; /* variables and functions already looked up */
};

choir_status template_error(template_render *r, const char *format, ...) CHOIR_PRINTF(2, 3);
choir_status template_charge(template_render *r, size_t steps);
static inline choir_status template_charge_bytes(template_render *r, size_t bytes)
{
    return template_charge(r, 1 + bytes / TEMPLATE_STEP_BYTES);
}
choir_status template_alloc(template_render *r, size_t bytes, void *out);
choir_status template_alloc_n(template_render *r, size_t n, size_t bytes, void *out);
choir_status template_undefined_error(template_render *r, template_value v);

choir_status template_eval(template_render *r, const template_node *node, template_value *out);
choir_status template_exec_body(template_render *r, template_node *const *list, size_t n);
choir_status template_assign(template_render *r, const template_node *target, template_value v);
choir_status template_lookup(template_render *r, const template_string *name, template_value *out);
choir_status template_bind(template_render *r, const template_string *name, template_value v);
choir_status template_call_macro(template_render *r, template_macro *macro,
                                 const template_arguments *args, template_value *out);
/* The next item that passes the loop's test. */
choir_status template_loop_fetch(template_render *r, template_loop *loop, template_value *out,
                                 bool *found);

choir_status template_binary(template_render *r, template_token_kind op, template_value a,
                             template_value b, template_value *out);
choir_status template_get_attribute(template_render *r, template_value object,
                                    const template_string *name, template_value *out);
choir_status template_get_item(template_render *r, template_value object, template_value key,
                               template_value *out);
/* Slices with MISSING or None for bounds left out. */
choir_status template_slice(template_render *r, template_value object,
                            const template_value bounds[3], template_value *out);
choir_status template_call(template_render *r, template_value callee,
                           const template_arguments *args, template_value *out);
/* `self` (may be NULL) goes before the other arguments. */
choir_status template_call_builtin(template_render *r, const template_builtin *f,
                                   const template_value *self, const template_arguments *args,
                                   template_value *out);
/* A JSON value as a template's; strings are views. */
choir_status template_from_json(template_render *r, const json_t *json, template_value *out);

const template_builtin *template_find_filter(const template_string *name);
const template_builtin *template_find_test(const template_string *name);
const template_builtin *template_find_global(const template_string *name);
const template_builtin *template_find_string_method(const template_string *name);
const template_builtin *template_find_builtin(const template_builtin *table, size_t n,
                                              const template_string *name);
const template_builtin *template_find_sequence_filter(const template_string *name);
choir_status template_apply_filter(template_render *r, const template_string *name,
                                   template_value v, const template_arguments *rest,
                                   template_value *out);
choir_status template_apply_test(template_render *r, const template_string *name, template_value v,
                                 const template_arguments *rest, bool *out);

/* Python's "…" % values, and "…".format(…). */
choir_status template_percent(template_render *r, const template_string *format,
                              template_value values, template_value *out);
choir_status template_format(template_render *r, const template_string *format,
                             const template_arguments *args, template_value *out);

/* Arguments of builtins. A MISSING slot leaves *out as it is. */
choir_status template_want_string(template_render *r, template_value v, const char *what,
                                  template_string **out);
choir_status template_want_int(template_render *r, template_value v, const char *what,
                               int64_t *out);
static inline bool template_given(template_value v)
{
    return v.type != TEMPLATE_MISSING;
}
