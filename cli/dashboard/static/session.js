// Signing in, and what may be done then.

import { toast } from "./dom.js";

const HEADERS = { "content-type": "application/json", "x-laxity-request": "1" };

async function post(path, body) {
  const answer = await fetch(path, { method: "POST", headers: HEADERS, body: JSON.stringify(body ?? {}) });
  const said = await answer.json().catch(() => ({}));
  if (!answer.ok) throw Object.assign(new Error(said.error ?? `the dashboard answered ${answer.status}`), { status: answer.status });
  return said;
}

export class Session {
  possible = false;
  signedIn = false;
  locked = false; // nothing is shown before somebody signs in

  /** `onChange()` once it is known who may do what, and whenever that changes. */
  constructor(button, dialog, onChange) {
    this.button = button;
    this.dialog = dialog;
    this.onChange = onChange;
    this.problem = dialog.querySelector(".problem");
    this.field = dialog.querySelector("[name=token]");
    button.addEventListener("click", () => (this.signedIn ? this.signOut() : this.ask()));
    dialog.querySelector("[value=cancel]").addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => (this.field.value = ""));
    dialog.querySelector("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#signIn();
    });
  }

  /** Look who this is; after a connection was lost, too. */
  async refresh() {
    try {
      const answer = await fetch("api/session");
      if (answer.ok) this.#is(await answer.json());
    } catch {
      // The stream says that nobody answers.
    }
  }

  ask() {
    this.problem.hidden = true;
    this.dialog.showModal();
    this.field.focus();
  }

  async #signIn() {
    try {
      this.#is(await post("api/sign-in", { token: this.field.value.trim() }));
      this.dialog.close();
      toast("Signed in");
    } catch (error) {
      this.problem.hidden = false;
      this.problem.textContent = `${error.message[0].toUpperCase()}${error.message.slice(1)}.`;
      this.field.select();
    }
  }

  async signOut() {
    await this.#try(async () => this.#is(await post("api/sign-out")));
    if (this.locked) location.reload(); // what is shown is not for everybody
  }

  async drain(node) {
    await this.#try(() => post(`api/nodes/${encodeURIComponent(node)}/drain`), `${node} is being emptied`);
  }

  async resume(node) {
    await this.#try(() => post(`api/nodes/${encodeURIComponent(node)}/resume`), `${node} may hold models again`);
  }

  async #try(change, done) {
    try {
      await change();
      if (done) toast(done);
    } catch (error) {
      toast(error.message);
      if (error.status === 401) await this.refresh();
    }
  }

  #is({ possible, needed, signed_in: signedIn }) {
    const locked = needed && !signedIn;
    if (locked && !this.locked && !this.dialog.open) this.ask();
    this.possible = possible;
    this.signedIn = signedIn;
    this.locked = locked;
    this.button.hidden = !possible;
    this.button.textContent = signedIn ? "Sign out" : "Sign in";
    this.onChange();
  }
}
