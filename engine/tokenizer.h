/* WHAT    Text to token ids and back, exactly as the model's own tokenizer does.
 * OWNS    Vocabulary, merges and compiled patterns; copies, independent of the model file.
 * THREADS Encode and decode: any number at once. A detokenizer has one owner.
 * ERRORS  CHOIR_E_INVALID (bad UTF-8, with its offset; an id beyond the vocabulary), CHOIR_E_FORMAT
 *         (a bad tokenizer file; names the field), CHOIR_E_UNIMPLEMENTED (a kind Choir lacks; names it).
 * LIMITS  Linear time in the text's length (n log n inside one word); memory bounded by the text.
 * NEXT    engine/chat_template.h */
#pragma once
#include "engine/model_file.h"

typedef struct choir_tokenizer choir_tokenizer;

/* From a GGUF's metadata, or the folder's tokenizer.json (tokenizer_config.json is read beside it). */
choir_status choir_tokenizer_open(const choir_model_file *file, choir_tokenizer **out) CHOIR_MUST_USE;
/* From the text of a tokenizer.json alone; for tests and fuzzing. */
choir_status choir_tokenizer_parse_json(const char *json, size_t bytes, choir_tokenizer **out)
    CHOIR_MUST_USE;
choir_status choir_tokenizer_parse_gguf(const choir_gguf *gguf, choir_tokenizer **out) CHOIR_MUST_USE;
void choir_tokenizer_destroy(choir_tokenizer *tokenizer);

typedef struct choir_encode_options {
    bool add_special;   /* what the post-processor adds: BOS, EOS */
    bool parse_special; /* special tokens written in the text become their ids */
} choir_encode_options;
#define CHOIR_ENCODE_OPTIONS_DEFAULT ((choir_encode_options){true, true})

/* *ids is choir_free()d by the caller. */
choir_status choir_tokenizer_encode(const choir_tokenizer *tokenizer, const char *text, size_t bytes,
                                    choir_encode_options options, uint32_t **ids, size_t *n_ids)
    CHOIR_MUST_USE;
/* *text is choir_free()d; a NUL lies behind it. Bytes that are no UTF-8 become U+FFFD. */
choir_status choir_tokenizer_decode(const choir_tokenizer *tokenizer, const uint32_t *ids, size_t n_ids,
                                    bool skip_special, char **text, size_t *bytes) CHOIR_MUST_USE;

uint32_t choir_tokenizer_n_ids(const choir_tokenizer *tokenizer);
bool choir_tokenizer_is_special(const choir_tokenizer *tokenizer, uint32_t id);
/* The token as the vocabulary writes it ("Ġthe"); NULL for a hole. Lent until destroy. */
const char *choir_tokenizer_piece(const choir_tokenizer *tokenizer, uint32_t id, size_t *bytes);
bool choir_tokenizer_find(const choir_tokenizer *tokenizer, const char *piece, size_t bytes,
                          uint32_t *id);
int32_t choir_tokenizer_bos(const choir_tokenizer *tokenizer); /* -1: none */
int32_t choir_tokenizer_eos(const choir_tokenizer *tokenizer);
const char *choir_tokenizer_kind(const choir_tokenizer *tokenizer); /* "byte-level BPE", … */

/* Tokens to text as they come: what is emitted is valid UTF-8; half a character is held back. The
 * emitted pieces and the flushed rest equal decode() of all ids. */
typedef struct choir_detokenizer choir_detokenizer;
choir_status choir_detokenizer_create(const choir_tokenizer *tokenizer, bool skip_special,
                                      choir_detokenizer **out) CHOIR_MUST_USE;
void choir_detokenizer_destroy(choir_detokenizer *detokenizer);
/* *text (may be empty) is lent until the next call on this detokenizer. */
choir_status choir_detokenizer_push(choir_detokenizer *detokenizer, uint32_t id, const char **text,
                                    size_t *bytes) CHOIR_MUST_USE;
choir_status choir_detokenizer_flush(choir_detokenizer *detokenizer, const char **text, size_t *bytes)
    CHOIR_MUST_USE;
