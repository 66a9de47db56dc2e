-- SPDX-License-Identifier: Apache-2.0
-- What a room has only because several guards share it: requests in flight whose guard may be gone, holds that a guard
-- gives back, and a server that may lose what it was told, or set its clock back.

-- Renew requests in flight of a guard. Returns how many there are.
function Seats.renew(hold_ids, lease)
  local renewed = 0
  for _, hold_id in ipairs(hold_ids) do
    local hold = pending[hold_id]
    if hold then
      hold.lease = lease
      pending[hold_id] = hold
      due.put(field_of(hold), lease)
      renewed = renewed + 1
    end
  end
  return renewed
end

-- A token that was issued with a seat.
function Seats.restore_issued(hold_id, user, alias, identity, expires, device)
  if hold_with(hold_id) then return end
  put_reserved(key_of(alias, identity), {
    id = hold_id, user = user, state = 'issued', alias = alias, identity = identity, sid = '', began = now,
    expires = expires, device = device,
  })
  room.vacated = math.max(room.vacated, now)
end

-- The sessions of an identity came with a token that had a seat.
function Seats.seat_sessions(alias, identity, user)
  Seats.rename(alias, identity, user)
  for _, hold in ipairs(sessions_with(alias, identity)) do
    if hold.state == 'unseated' then move(hold, 'seat') end
  end
end

-- Whether anything is held for an identity.
function Seats.knows(alias, identity)
  local key = key_of(alias, identity)
  return reserved[key] ~= nil or sessions_of[key] ~= nil
end

-- Requests in flight end, and every SFU room has to be listed again: the data set may be an older one.
function Seats.distrust()
  for _, hold in ipairs(in_order(Store.all('p'))) do move(hold, 'release') end
  room.listed = {}
  room.version = room.version + 1
end

-- The server's clock was set back: what was written before counts from the new time.
function Seats.shift(by)
  room.unlimited_at, room.vacated = room.unlimited_at + by, room.vacated + by
  if room.waited_until then room.waited_until = room.waited_until + by end
  for alias, since in pairs(room.listed) do room.listed[alias] = since + by end
  for _, hold in ipairs(all_holds()) do
    hold.began, hold.expires = hold.began + by, hold.expires + by
    if hold.lease then hold.lease = hold.lease + by end
    write(field_of(hold), hold)
  end
  for _, name in ipairs(Store.names('c')) do
    local times = read(name)
    write(name, {expires = times.expires + by, asked = times.asked + by})
  end
  for _, times in ipairs({due, unconfirmed, ended}) do
    for _, found in ipairs(times.up_to()) do times.put(found[1], found[2] + by) end
  end
end
