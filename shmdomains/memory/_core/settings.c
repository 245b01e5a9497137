/* settings.c - what the list remembers for its users: some bytes, double-buffered.
 *
 * A writer holds the list lock.  It fills the spare buffer, then stores `settings_choice`, which
 * makes it current: a dead writer leaves the old settings, and garbage in the spare buffer.  A
 * reader takes no lock: it copies the current buffer, and again if the choice has changed.
 */
#include "settings.h"

static sd_word *settings_at(const sd_segment *segment, uint64_t choice)
{
    return (sd_word *)(segment->base + segment->at.settings) + choice * (SD_SETTINGS_BYTES / 8 + 1);
}

int sd_settings_set(sd_segment *segment, const void *bytes, uint64_t size)
{
    sd_header *header = segment->header;
    uint64_t choice = sd_unsealed(sd_load(&header->settings_choice)) + 1;
    if (size > SD_SETTINGS_BYTES) return SD_FULL;
    if (!choice) return SD_CORRUPT;
    sd_word *to = settings_at(segment, choice & 1);
    sd_store(to, size);
    sd_copy_in(to + 1, bytes, size);
    sd_publish(&header->settings_choice, sd_seal(choice));
    return SD_OK;
}

int sd_settings_get(const sd_segment *segment, void *out, uint64_t *size)
{
    const sd_word *choice = &segment->header->settings_choice;
    for (int tries = 0; tries < 1000; tries++) {
        uint64_t before = sd_load_acquire(choice);
        if (sd_unsealed(before) == UINT64_MAX) return SD_CORRUPT;
        const sd_word *from = settings_at(segment, before & 1);
        *size = sd_load(from);
        if (*size <= SD_SETTINGS_BYTES) sd_copy_out(out, from + 1, *size);
        atomic_thread_fence(memory_order_acquire);
        if (sd_load(choice) != before) continue;
        return *size <= SD_SETTINGS_BYTES ? SD_OK : SD_CORRUPT;
    }
    return SD_DOUBT;
}
